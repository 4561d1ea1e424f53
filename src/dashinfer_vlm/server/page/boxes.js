// Where an answer says that something is, drawn over the picture that was asked about.

import { el, svg } from "./dom.js";

const TOKENS = /(?:<\|object_ref_start\|>([^<]*)<\|object_ref_end\|>)?\s*<\|box_start\|>\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)<\|box_end\|>/g;
const OBJECT = /\{[^{}]*"(?:bbox_2d|point_2d)"[^{}]*\}/g;
const MARKS = /<\|(?:object_ref|box|quad)_(?:start|end)\|>/g;
const HUES = 6;

// The boxes of an answer about a picture of `width` x `height` pixels, in fractions of its sides:
// [{label, left, top, right, bottom}]; a point has no size. `model` says how the model sees pictures.
//
// Qwen2-VL writes box tokens, in thousandths; Qwen2.5-VL and Qwen3-VL write JSON, in pixels of the picture after resizing
// and in thousandths. Incomplete ones, at the end of a stream, are left out.
export function findBoxes(text, { width, height }, model) {
  const scale = model.box_unit === "thousandths" ? [1000, 1000] : resizedTo(width, height, model);
  return [...inJson(text, scale), ...inTokens(text)];
}

// The answer without the tokens around names and boxes.
export function withoutMarks(text) {
  return text.replace(MARKS, "");
}

// The sides that the server resizes a picture to: `smart_resize` of processors/qwen.py.
export function resizedTo(width, height, { side_step: step, min_pixels: least, max_pixels: most }) {
  const sides = [width, height].map((side) => roundHalfEven(side / step) * step);
  const area = sides[0] * sides[1];
  if (area > most) {
    const shrink = Math.sqrt((width * height) / most);
    return [width, height].map((side) => Math.max(step, Math.floor(side / shrink / step) * step));
  }
  if (area < least) {
    const grow = Math.sqrt(least / (width * height));
    return [width, height].map((side) => Math.ceil((side * grow) / step) * step);
  }
  return sides;
}

// The picture at `src` with its boxes over it.
export function boxFigure(src, boxes) {
  const labels = [...new Set(boxes.map((box) => box.label))];
  const shapes = boxes.map((box) => shape(box, labels.indexOf(box.label) % HUES));
  const names = boxes.map((box) => name(box, labels.indexOf(box.label) % HUES));
  const told = boxes.map((box) => `${box.label || "something"} at ${percent(box.left)} across, ${percent(box.top)} down`);
  return el(
    "figure",
    { class: "boxes" },
    el(
      "div",
      { class: "boxes-frame" },
      el("img", { src, alt: `The picture with ${boxes.length} marked: ${told.join("; ")}`, referrerpolicy: "no-referrer" }),
      svg("svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": "true" }, ...shapes),
      ...names,
    ),
  );
}

function inJson(text, scale) {
  return [...text.matchAll(OBJECT)].flatMap(([source]) => {
    const found = parse(source);
    const numbers = found?.bbox_2d ?? found?.point_2d;
    if (!Array.isArray(numbers) || ![2, 4].includes(numbers.length) || !numbers.every(Number.isFinite)) return [];
    const corners = numbers.length === 2 ? [...numbers, ...numbers] : numbers;
    return [box(String(found.label ?? found.text_content ?? ""), corners, scale)];
  });
}

function inTokens(text) {
  return [...text.matchAll(TOKENS)].map(([, label, ...corners]) => box((label ?? "").trim(), corners.map(Number), [1000, 1000]));
}

function box(label, [x1, y1, x2, y2], [width, height]) {
  const [left, right] = [x1 / width, x2 / width].map(clip).sort((a, b) => a - b);
  const [top, bottom] = [y1 / height, y2 / height].map(clip).sort((a, b) => a - b);
  return { label, left, top, right, bottom };
}

function shape({ left, top, right, bottom }, hue) {
  const place = { class: `box hue-${hue}`, x: left, y: top, width: right - left, height: bottom - top };
  const isPoint = left === right && top === bottom;
  // a line of no length with round ends is a dot of one size, however the picture is stretched
  return isPoint ? svg("path", { class: `box dot hue-${hue}`, d: `M${left} ${top}h0` }) : svg("rect", place);
}

// A name stands above its box, or below where there is no room, and ends with it near the right edge.
function name({ label, left, top, right, bottom }, hue) {
  const node = el("span", { class: `box-name hue-${hue}`, "aria-hidden": "true", hidden: label === "" }, label);
  const [isLow, isRight] = [top < 0.08, left > 0.6];
  node.classList.toggle("below", isLow);
  node.classList.toggle("end", isRight);
  node.style.setProperty("--left", percent(isRight ? right : left));
  node.style.setProperty("--top", percent(isLow ? bottom : top));
  return node;
}

function parse(source) {
  try {
    return JSON.parse(source);
  } catch {
    return null;
  }
}

function roundHalfEven(value) {
  const rounded = Math.round(value);
  return value % 1 === 0.5 && rounded % 2 ? rounded - 1 : rounded;
}

const clip = (value) => Math.min(Math.max(value, 0), 1);
const percent = (fraction) => `${Math.round(fraction * 1000) / 10}%`;
