// Pictures and videos of a chat, for the eye and for the server.

import { loadMedium } from "./store.js";

const shown = new Map(); // addresses of media that are on the screen or were, by id

// An identifier that nobody else has; crypto.randomUUID exists only under TLS and on localhost.
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Addresses that elements can show, by medium.
export async function sourcesOf(turns) {
  const media = turns.flatMap((turn) => turn.media ?? []);
  return new Map(await Promise.all(media.map(async (medium) => [medium, medium.url ?? (await source(medium.id))])));
}

// The turns as messages of the API; turns that never got an answer are left out.
export async function messagesOf(turns, system) {
  const said = turns.filter((turn) => turn.role === "user" || turn.text);
  const messages = await Promise.all(said.map(async (turn) => ({ role: turn.role, content: await contentOf(turn) })));
  return [...(system ? [{ role: "system", content: system }] : []), ...messages];
}

async function contentOf({ text, media = [] }) {
  if (!media.length) return text;
  const parts = await Promise.all(media.map(partOf));
  return [...parts, ...(text ? [{ type: "text", text }] : [])];
}

async function partOf({ kind, id, url, name }) {
  const blob = url ? null : await loadMedium(id);
  if (!url && !blob) throw new Error(`${name} is no longer in this browser; send it again`);
  const address = url ?? (await dataUrl(blob));
  return kind === "video" ? { type: "video_url", video_url: { url: address } } : { type: "image_url", image_url: { url: address } };
}

async function source(id) {
  if (!shown.has(id)) {
    const blob = await loadMedium(id);
    shown.set(id, blob && URL.createObjectURL(blob));
  }
  return shown.get(id);
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
