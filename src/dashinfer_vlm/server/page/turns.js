// One turn of a chat as elements.

import { boxFigure, findBoxes, withoutMarks } from "./boxes.js";
import { preview } from "./composer.js";
import { copyButton, el, iconButton } from "./dom.js";
import { codeBlock, showMarkdown } from "./markdown.js";

const LEAST_MS = 20; // of a stream whose speed means something: browsers hand over what came together

// What the user said; `onedit(text)` says it again in other words.
export function userTurn(turn, { onedit }) {
  const media = turn.media.map((medium) => el("li", {}, preview(medium)));
  const body = el("div", { class: "bubble" });
  const node = el("article", { class: "turn user", "aria-label": "You" });
  const show = () => {
    body.replaceChildren(turn.text);
    body.hidden = !turn.text;
    const edit = iconButton("edit", "Edit", () => node.replaceChildren(...[tray, editor(turn.text, onedit, show)].filter(Boolean)));
    node.replaceChildren(...[tray, body, el("div", { class: "actions" }, edit)].filter(Boolean));
  };
  const tray = media.length ? el("ul", { class: "media" }, ...media) : null;
  show();
  return node;
}

// The model's answer. `begin()` says that one is on its way, `update()` shows what the turn has become, `finish()` that
// nothing more will come.
export class AnswerTurn {
  constructor(turn, { picturesOf, model, onretry }) {
    this.turn = turn;
    this.model = model;
    this.pictures = picturesOf(turn);
    this.onretry = onretry;
    this.reasoning = new Reasoning();
    this.text = el("div", { class: "answer" });
    this.boxes = el("div", { class: "grounding" });
    this.foot = el("footer", { class: "foot" });
    this.node = el("article", { class: "turn assistant", "aria-label": "Answer" }, this.reasoning.node, this.text, this.boxes, this.foot);
    this.picture = 0;
    this.numBoxes = 0;
    this.pending = 0;
  }

  begin() {
    this.foot.replaceChildren();
    this.show(false);
  }

  // Many pieces may come before the screen is drawn once.
  update() {
    this.pending ||= requestAnimationFrame(() => this.show(false));
  }

  finish() {
    this.show(true);
  }

  show(done) {
    cancelAnimationFrame(this.pending);
    this.pending = 0;
    this.node.classList.toggle("writing", !done);
    this.node.setAttribute("aria-busy", String(!done));
    this.reasoning.show(this.turn, done);
    this.showText();
    this.showBoxes();
    if (done) this.foot.replaceChildren(...this.outcome());
  }

  showText() {
    const text = withoutMarks(this.turn.text);
    if (!this.turn.structured) showMarkdown(this.text, text);
    else if (text) this.text.replaceChildren(codeBlock(pretty(text), "json"));
  }

  showBoxes() {
    const picture = this.pictures[this.picture];
    if (!picture?.width) return;
    const boxes = findBoxes(this.turn.text, picture, this.model);
    if (boxes.length === this.numBoxes) return;
    this.numBoxes = boxes.length;
    this.boxes.replaceChildren(...this.choice(), boxFigure(picture.src, boxes));
  }

  // An answer does not say which of several pictures it means.
  choice() {
    if (this.pictures.length < 2) return [];
    const options = this.pictures.map((_, i) => el("option", { value: i, selected: i === this.picture }, `Picture ${i + 1}`));
    const onchange = (event) => {
      this.picture = Number(event.target.value);
      this.numBoxes = 0;
      this.showBoxes();
    };
    return [el("label", { class: "choice" }, "Boxes on ", el("select", { onchange }, ...options))];
  }

  outcome() {
    const { turn } = this;
    const retry = iconButton("retry", "Try again", this.onretry);
    const copy = copyButton("Copy answer", () => withoutMarks(turn.text));
    const problem = turn.error && el("p", { class: "problem", role: "alert" }, turn.error);
    const ended = { length: "ended by the limit of tokens", stopped: "stopped" }[turn.finish];
    const figures = [ended, ...figuresOf(turn)].filter(Boolean).map((text) => el("span", {}, text));
    const buttons = el("div", { class: "actions" }, ...(turn.text ? [copy] : []), retry);
    return [...(problem ? [problem] : []), el("div", { class: "figures" }, buttons, el("div", { class: "costs" }, ...figures))];
  }
}

// What the model thought before its answer: in sight until the answer begins, folded afterwards, unless the user wants it
// otherwise.
class Reasoning {
  constructor() {
    this.label = el("summary", { onclick: () => (this.isChosen = true) });
    this.text = el("div", { class: "thoughts" });
    this.node = el("details", { class: "reasoning", hidden: true }, this.label, this.text);
  }

  show({ reasoning = "", text }, done) {
    const thinks = !text && !done;
    this.node.hidden = !reasoning;
    this.label.textContent = thinks ? "Thinking…" : "Reasoning";
    if (!this.isChosen) this.node.open = thinks;
    if (this.text.textContent !== reasoning) this.text.textContent = reasoning;
  }
}

// What an answer cost, in words: [first token, speed, prompt].
function figuresOf({ usage, firstMs, lastMs }) {
  const figures = [];
  if (firstMs !== undefined) figures.push(`${seconds(firstMs)} to the first token`);
  if (!usage) return figures;
  const { completion_tokens: written, prompt_tokens: read, prompt_tokens_details: details } = usage;
  if (written > 1 && lastMs - firstMs >= LEAST_MS) figures.push(`${((written - 1) / ((lastMs - firstMs) / 1000)).toFixed(1)} tokens/s`);
  figures.push(`${count(written)} tokens`, `prompt ${count(read)}, ${count(details.cached_tokens)} cached`);
  return figures;
}

function editor(text, onedit, oncancel) {
  const area = el("textarea", { "aria-label": "Edit your message", rows: "3" });
  area.value = text;
  const save = el("button", { class: "primary", type: "submit" }, "Send");
  const cancel = el("button", { type: "button", onclick: oncancel }, "Cancel");
  const onsubmit = (event) => {
    event.preventDefault();
    onedit(area.value.trim());
  };
  const onkeydown = (event) => {
    if (event.key === "Escape") oncancel();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) onsubmit(event);
  };
  area.addEventListener("keydown", onkeydown);
  queueMicrotask(() => area.focus());
  return el("form", { class: "editor", onsubmit }, area, el("div", { class: "editor-buttons" }, cancel, save));
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // not complete yet
  }
}

const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
const count = (number) => number.toLocaleString("en");
