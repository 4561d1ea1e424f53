// Elements without markup: whatever text comes in, from a model or a user, stays text.

const SVG = "http://www.w3.org/2000/svg";

// An element with attributes; `onclick` and its like are listeners, `true` is an empty attribute, `false` and null none.
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

// One of the symbols that index.html defines.
export function icon(name) {
  return svg("svg", { class: "icon", "aria-hidden": "true" }, svg("use", { href: `#icon-${name}` }));
}

// A button with an icon; `label` is its name for everybody who does not see it, and its tooltip.
export function iconButton(name, label, onclick, attributes = {}) {
  return el("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...attributes }, icon(name));
}

// A button that copies what `text()` gives.
export function copyButton(label, text) {
  return iconButton("copy", label, () => copy(text()));
}

export function byId(id) {
  return document.getElementById(id);
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // browsers keep the clipboard from pages of other machines without TLS, but not this older way
  const area = el("textarea", { class: "visually-hidden" });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
