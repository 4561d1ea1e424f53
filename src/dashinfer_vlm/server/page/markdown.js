// The part of Markdown that models write, as elements. Text never becomes markup, links lead to http and https only, and
// there are no images: an answer cannot make the browser fetch anything.

import { copyButton, el } from "./dom.js";

const FENCE = /^\s*(```+|~~~+)\s*([\w+#.-]*)/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const RULE = /^\s*([-*_])(\s*\1){2,}\s*$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const INLINE = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*(?=\S)([\s\S]+?)(?<=\S)\*\*|(?<!\w)__(?=\S)([\s\S]+?)(?<=\S)__(?!\w)|\*(?=[^\s*])([^*]+?)(?<=\S)\*|(?<!\w)_(?=[^\s_])([^_]+?)(?<=\S)_(?!\w)|~~(?=\S)([\s\S]+?)(?<=\S)~~|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)|(https?:\/\/[^\s<>()]+[^\s<>().,;:!?'"])/;

const MOST_INLINE = 20_000;

// Show `text` in `parent`. Blocks that did not change keep their elements, and with them what a reader has selected.
export function showMarkdown(parent, text) {
  const sources = blocks(text);
  sources.forEach((block, i) => {
    const source = block.lines.join("\n");
    const old = parent.children[i];
    if (old?.dataset.source === `${block.kind}\n${source}`) return;
    const made = MAKERS[block.kind](block.lines);
    made.dataset.source = `${block.kind}\n${source}`;
    if (old) old.replaceWith(made);
    else parent.append(made);
  });
  while (parent.children.length > sources.length) parent.lastChild.remove();
}

// A block of code with a button that copies it.
export function codeBlock(code, language = "") {
  const copy = copyButton("Copy code", () => code);
  const head = el("div", { class: "code-head" }, el("span", {}, language), copy);
  // scrollable, so it must be reachable by keyboard
  return el("div", { class: "code" }, head, el("pre", { tabindex: "0" }, el("code", {}, code)));
}

const MAKERS = {
  code: (lines) => codeBlock(withoutFences(lines).join("\n"), lines[0].match(FENCE)[2]),
  heading: (lines) => {
    const [, marks, title] = lines[0].match(HEADING);
    return el(`h${Math.min(marks.length + 2, 6)}`, {}, ...inline(title)); // h1 and h2 are the page's own
  },
  rule: () => el("hr"),
  quote: (lines) => nested("blockquote", lines.map((line) => line.replace(/^\s*>\s?/, ""))),
  list: (lines) => list(lines),
  table: (lines) => table(lines),
  paragraph: (lines) => el("p", {}, ...inline(lines.join("\n"))),
};

// [{kind, lines}] of a text; an open fence at the end of a stream is code already.
function blocks(text) {
  const lines = text.split("\n");
  const found = [];
  let i = 0;
  while (i < lines.length) {
    const kind = kindOf(lines, i);
    const start = i++;
    if (kind === "blank") continue;
    while (i < lines.length && goesOn(kind, lines, start, i)) i++;
    found.push({ kind, lines: lines.slice(start, i) });
  }
  return found;
}

function kindOf(lines, i) {
  const line = lines[i];
  if (!line.trim()) return "blank";
  if (FENCE.test(line)) return "code";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (/^\s*>/.test(line)) return "quote";
  if (ITEM.test(line)) return "list";
  if (line.includes("|") && TABLE_RULE.test(lines[i + 1] ?? "") && lines[i + 1].includes("-")) return "table";
  return "paragraph";
}

function goesOn(kind, lines, start, i) {
  const next = kindOf(lines, i);
  if (kind === "code") return !closed(lines, start, i);
  if (kind === "table") return lines[i].includes("|");
  if (kind === "list") return next === "list" || /^\s{2,}\S/.test(lines[i]) || (next === "blank" && listFollows(lines, i));
  if (kind === "quote") return next === "quote";
  return kind === "paragraph" && next === "paragraph";
}

function closed(lines, start, i) {
  const fence = lines[start].match(FENCE)[1];
  return i > start + 1 && isFence(lines[i - 1], fence);
}

const isFence = (line, fence) => line.trim().startsWith(fence) && /^[`~]+$/.test(line.trim());

function withoutFences(lines) {
  const fence = lines[0].match(FENCE)[1];
  const last = lines.length > 1 && isFence(lines.at(-1), fence);
  return lines.slice(1, last ? -1 : undefined);
}

function listFollows(lines, i) {
  const next = lines.slice(i).find((line) => line.trim());
  return next !== undefined && (ITEM.test(next) || /^\s{2,}\S/.test(next));
}

function list(lines) {
  const [, indent, mark] = lines[0].match(ITEM);
  const ordered = /\d/.test(mark);
  const items = [];
  for (const line of lines) {
    const item = line.match(ITEM);
    if (item && item[1].length <= indent.length) items.push([item[3]]);
    else items.at(-1).push(line.slice(Math.min(indent.length + 2, line.length - line.trimStart().length)));
  }
  return el(ordered ? "ol" : "ul", ordered ? { start: parseInt(mark, 10) } : {}, ...items.map(listItem));
}

function listItem(lines) {
  if (lines.length === 1) return el("li", {}, ...inline(lines[0]));
  return nested("li", lines);
}

function nested(tag, lines) {
  const parent = el(tag);
  showMarkdown(parent, lines.join("\n"));
  return parent;
}

function table([head, , ...rows]) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => inline(cell.trim()));
  const row = (line, tag) => el("tr", {}, ...cells(line).map((cell) => el(tag, {}, ...cell)));
  const body = el("tbody", {}, ...rows.map((line) => row(line, "td")));
  return el("div", { class: "table", tabindex: "0" }, el("table", {}, el("thead", {}, row(head, "th")), body));
}

function inline(text) {
  const found = [];
  let rest = text;
  // what cannot be looked through in no time is shown as it is
  for (let match; rest.length <= MOST_INLINE && (match = rest.match(INLINE)); rest = rest.slice(match.index + match[0].length)) {
    const [, , code, strong, strong2, em, em2, deleted, label, href, url] = match;
    found.push(rest.slice(0, match.index), span({ code, strong: strong ?? strong2, em: em ?? em2, deleted, label, href, url }));
  }
  return [...found, rest].filter((piece) => piece !== "");
}

function span({ code, strong, em, deleted, label, href, url }) {
  if (code !== undefined) return el("code", {}, code.replace(/^ (.*\S.*) $/, "$1"));
  if (strong !== undefined) return el("strong", {}, ...inline(strong));
  if (em !== undefined) return el("em", {}, ...inline(em));
  if (deleted !== undefined) return el("del", {}, ...inline(deleted));
  return el("a", { href: href ?? url, target: "_blank", rel: "noopener noreferrer" }, label ?? url);
}
