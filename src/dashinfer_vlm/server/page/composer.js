// Where the next turn is written: its text, and pictures and videos that were chosen, pasted, dropped or named by URL.

import { byId, el, icon, iconButton } from "./dom.js";

// Calls `onsend({text, media})`; media are [{kind, blob, name, width, height} | {kind, url, name}].
export class Composer {
  constructor({ onsend, onstop, say }) {
    this.media = [];
    this.onsend = onsend;
    this.onstop = onstop;
    this.say = say;
    this.busy = false;
    this.text = byId("prompt");
    this.tray = byId("tray");
    this.listen();
    this.refresh();
  }

  clear() {
    for (const medium of this.media) if (medium.blob) URL.revokeObjectURL(medium.src);
    this.media = [];
    this.text.value = "";
    this.showTray();
    this.refresh();
  }

  // While an answer is written the button stops it.
  setBusy(busy) {
    this.busy = busy;
    this.refresh();
  }

  async addFiles(files) {
    for (const file of files) {
      const kind = file.type.split("/")[0];
      if (kind !== "image" && kind !== "video") {
        this.say(`${file.name} is neither a picture nor a video`);
        continue;
      }
      const src = URL.createObjectURL(file);
      const sides = kind === "image" ? await measure(src) : null;
      this.media.push({ kind, blob: file, src, name: file.name || "pasted picture", ...sides });
    }
    this.showTray();
    this.refresh();
  }

  async addUrl(text) {
    const url = URL.parse(text.trim());
    if (!url || !["http:", "https:"].includes(url.protocol)) {
      this.say("A picture's address begins with http:// or https://");
      return false;
    }
    const name = decodeURIComponent(url.pathname.split("/").at(-1)) || url.host;
    const sides = await measure(url.href);
    this.media.push({ kind: "image", url: url.href, src: url.href, name, ...sides });
    this.showTray();
    this.refresh();
    return true;
  }

  listen() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.text.addEventListener("input", () => this.refresh());
    this.text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.busy) this.send();
    });
    byId("send").addEventListener("click", (event) => {
      if (!this.busy) return;
      event.preventDefault();
      this.onstop();
    });
    this.listenToFiles();
    this.listenToUrl();
  }

  listenToFiles() {
    const input = byId("files");
    byId("attach").addEventListener("click", () => input.click());
    input.addEventListener("change", async () => {
      await this.addFiles([...input.files]);
      input.value = "";
      this.text.focus();
    });
    document.addEventListener("paste", (event) => {
      const files = [...event.clipboardData.files];
      if (!files.length) return;
      event.preventDefault();
      this.addFiles(files);
    });
    const overlay = byId("drop");
    document.addEventListener("dragenter", (event) => {
      if (event.dataTransfer.types.some((type) => type === "Files" || type === "text/uri-list")) overlay.hidden = false;
    });
    overlay.addEventListener("dragleave", () => (overlay.hidden = true));
    document.addEventListener("dragover", (event) => event.preventDefault());
    document.addEventListener("drop", (event) => this.drop(event));
  }

  async drop(event) {
    event.preventDefault();
    byId("drop").hidden = true;
    const { files } = event.dataTransfer;
    const url = event.dataTransfer.getData("text/uri-list").split("\n").find((line) => line && !line.startsWith("#"));
    if (files.length) await this.addFiles([...files]);
    else if (url) await this.addUrl(url);
    this.text.focus();
  }

  listenToUrl() {
    const dialog = byId("url-dialog");
    const input = byId("url");
    byId("link").addEventListener("click", () => {
      input.value = "";
      dialog.showModal();
    });
    byId("url-form").addEventListener("submit", async (event) => {
      event.preventDefault();
      if (await this.addUrl(input.value)) dialog.close();
    });
    byId("url-cancel").addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => this.text.focus());
  }

  send() {
    if (!this.text.value.trim() && !this.media.length) return;
    this.onsend({ text: this.text.value.trim(), media: this.media });
  }

  showTray() {
    this.tray.replaceChildren(...this.media.map((medium) => this.thumbnail(medium)));
    this.tray.hidden = !this.media.length;
  }

  thumbnail(medium) {
    const remove = () => {
      this.media = this.media.filter((other) => other !== medium);
      if (medium.blob) URL.revokeObjectURL(medium.src);
      this.showTray();
      this.refresh();
      this.text.focus();
    };
    return el("li", {}, preview(medium), iconButton("close", `Remove ${medium.name}`, remove, { class: "remove" }));
  }

  refresh() {
    const send = byId("send");
    send.disabled = !this.busy && !this.text.value.trim() && !this.media.length;
    send.setAttribute("aria-label", this.busy ? "Stop" : "Send");
    send.title = this.busy ? "Stop (Esc)" : "Send (Enter)";
    send.replaceChildren(icon(this.busy ? "stop" : "send"));
    send.classList.toggle("busy", this.busy);
    this.text.style.height = "auto";
    this.text.style.height = `${this.text.scrollHeight}px`;
  }
}

// A small picture of a medium, or its name where the browser cannot show it.
export function preview({ kind, src, name }) {
  const named = () => el("span", { class: "medium-name" }, icon(kind), name);
  if (!src) return named();
  if (kind === "video") return el("video", { src, controls: true, preload: "metadata", "aria-label": name });
  const image = el("img", { src, alt: name, referrerpolicy: "no-referrer" });
  image.addEventListener("error", () => image.replaceWith(named()));
  return image;
}

// Sides of a picture in pixels, turned as its EXIF says; none when this browser cannot read it (the server may).
async function measure(src) {
  const image = new Image();
  image.referrerPolicy = "no-referrer";
  image.src = src;
  try {
    await image.decode();
    return { width: image.naturalWidth, height: image.naturalHeight };
  } catch {
    return null;
  }
}
