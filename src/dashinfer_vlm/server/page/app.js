// The page: one chat at a time, its history beside it, parameters at the other side.

import { answer, describeModel } from "./api.js";
import { Composer } from "./composer.js";
import { byId } from "./dom.js";
import { showHistory } from "./history.js";
import { messagesOf, newId, sourcesOf } from "./media.js";
import { Parameters, askForKey, setPanel, setUpTheme } from "./settings.js";
import { deleteChat, listChats, loadChat, saveChat, saveMedium } from "./store.js";
import { AnswerTurn, userTurn } from "./turns.js";

const SAVE_MS = 1000;
const NEAR_PX = 80;

class App {
  constructor() {
    this.chat = emptyChat();
    this.running = null; // AbortController of the answer that is being written
    this.follows = true; // whether the end of the transcript stays in sight
    this.parameters = new Parameters();
    this.composer = new Composer({ onsend: (turn) => this.send(turn), onstop: () => this.stop(), say });
    this.listen();
  }

  async start() {
    this.model = await modelWithKey();
    byId("model").textContent = this.model.name;
    byId("model").title = `Prompt and answer: ${this.model.max_model_len.toLocaleString("en")} tokens at most`;
    const last = await loadChat(location.hash.slice(1));
    await this.open(last ?? emptyChat());
    await this.refreshHistory();
  }

  listen() {
    const scroller = byId("scroller");
    // only the user leaves the end: growing text and pictures that arrive late scroll, too
    for (const kind of ["wheel", "touchmove", "pointerdown", "keydown"]) {
      scroller.addEventListener(kind, () => (this.follows = false), { passive: true });
    }
    scroller.addEventListener("scroll", () => {
      this.follows ||= scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_PX;
    });
    new ResizeObserver(() => this.follow()).observe(byId("transcript"));
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
      if (this.running) this.stop();
      else setHistory(false);
    });
    for (const button of document.querySelectorAll(".new-chat")) button.addEventListener("click", () => this.open(emptyChat()));
    byId("history-toggle").addEventListener("click", () => setHistory(!document.body.classList.contains("with-history")));
    byId("shade").addEventListener("click", () => setHistory(false));
    byId("panel-toggle").addEventListener("click", () => setPanel(byId("panel").hidden));
    byId("panel-close").addEventListener("click", () => {
      setPanel(false);
      byId("panel-toggle").focus();
    });
    for (const button of document.querySelectorAll(".idea")) {
      button.addEventListener("click", () => {
        byId("prompt").value = button.textContent;
        this.composer.refresh();
        byId("prompt").focus();
      });
    }
  }

  async open(chat) {
    this.stop();
    this.chat = chat;
    location.replace(`#${chat.turns.length ? chat.id : ""}`);
    await this.showTranscript();
    await this.refreshHistory();
    setHistory(false);
    byId("prompt").focus();
  }

  async send({ text, media }) {
    if (!this.parameters.check()) return;
    const { chat } = this;
    const stored = await Promise.all(media.map((medium) => store(medium, chat.id)));
    chat.turns.push({ role: "user", text, media: stored });
    chat.title ||= text.slice(0, 80) || "Picture";
    this.composer.clear();
    location.replace(`#${chat.id}`);
    await this.generate();
  }

  // Say turn `i` in other words, or ask it again; what came after it is forgotten.
  async again(i, text = this.chat.turns[i].text) {
    if (!this.parameters.check()) return;
    this.stop();
    this.chat.turns.length = i + 1;
    this.chat.turns[i].text = text;
    await this.generate();
  }

  async generate() {
    const { chat } = this;
    const turn = { role: "assistant", text: "", finish: "stopped", structured: this.parameters.isStructured };
    chat.turns.push(turn);
    this.follows = true;
    await this.save(chat);
    await this.showTranscript();
    const running = (this.running = new AbortController());
    this.composer.setBusy(true);
    say("The answer is being written");
    const view = this.views.at(-1);
    view.begin();
    await this.receive(chat, turn, view, running.signal);
    await this.save(chat);
    if (this.running !== running) return; // stopped, and something else has begun
    this.running = null;
    this.composer.setBusy(false);
    view.finish();
    say(turn.error ?? turn.text);
    await this.refreshHistory();
  }

  // Fill `turn` with the answer, or with what went wrong.
  async receive(chat, turn, view, signal) {
    try {
      const messages = await messagesOf(chat.turns.slice(0, -1), this.parameters.system);
      // boxes are special tokens in Qwen2-VL's answers
      const body = { model: "model", messages, skip_special_tokens: false, ...this.parameters.request() };
      const start = performance.now();
      let saved = start;
      for await (const news of answer(body, signal)) {
        apply(turn, news, performance.now() - start);
        view.update();
        if (performance.now() - saved < SAVE_MS) continue;
        saved = performance.now();
        await this.save(chat);
      }
    } catch (error) {
      if (signal.aborted) return;
      turn.error = error.message;
      turn.finish = "error";
      if (error.status === 401) askForKey(true);
    }
  }

  stop() {
    if (!this.running) return;
    this.running.abort();
    this.running = null;
    this.composer.setBusy(false);
    this.views.at(-1)?.finish?.();
    say("Stopped");
  }

  async save(chat) {
    chat.updated = Date.now();
    await saveChat(chat);
  }

  async showTranscript() {
    const { turns } = this.chat;
    const sources = await sourcesOf(turns);
    const shown = (turn) => turn.media.map((medium) => ({ ...medium, src: sources.get(medium) }));
    const picturesOf = (turn) => {
      const asked = turns.slice(0, turns.indexOf(turn)).findLast((t) => t.media?.some(({ kind }) => kind === "image"));
      return asked ? shown(asked).filter(({ kind }) => kind === "image") : [];
    };
    this.views = turns.map((turn, i) => {
      if (turn.role === "user") return { node: userTurn({ ...turn, media: shown(turn) }, { onedit: (text) => this.again(i, text) }) };
      return new AnswerTurn(turn, { picturesOf, model: this.model, onretry: () => this.again(i - 1) });
    });
    for (const view of this.views) view.finish?.();
    byId("transcript").replaceChildren(...this.views.map(({ node }) => node));
    document.body.classList.toggle("empty", !turns.length);
    this.follow();
  }

  follow() {
    const scroller = byId("scroller");
    if (this.follows) scroller.scrollTop = scroller.scrollHeight;
  }

  async refreshHistory() {
    const chats = await listChats();
    showHistory(chats, {
      current: this.chat.id,
      onopen: (chat) => this.open(chat),
      ondelete: async (chat) => {
        await deleteChat(chat.id);
        if (chat.id === this.chat.id) await this.open(emptyChat());
        else await this.refreshHistory();
      },
    });
  }
}

function apply(turn, { reasoning, text, usage, finish }, ms) {
  if (reasoning || text) {
    turn.firstMs ??= ms;
    turn.lastMs = ms;
  }
  if (reasoning) turn.reasoning = (turn.reasoning ?? "") + reasoning;
  if (text) turn.text += text;
  if (usage) turn.usage = usage;
  if (finish) turn.finish = finish;
}

async function store({ kind, blob, url, name, width, height }, chat) {
  if (url) return { kind, url, name, width, height };
  const id = newId();
  await saveMedium(id, chat, blob);
  return { kind, id, name, width, height };
}

async function modelWithKey() {
  for (let isWrong = false; ; isWrong = true) {
    try {
      return await describeModel();
    } catch (error) {
      if (error.status !== 401) throw error;
      await askForKey(isWrong);
    }
  }
}

function emptyChat() {
  return { id: newId(), title: "", updated: Date.now(), turns: [] };
}

function setHistory(open) {
  document.body.classList.toggle("with-history", open);
  byId("history-toggle").setAttribute("aria-expanded", String(open));
}

// For those who hear the page.
function say(text) {
  byId("status").textContent = text;
}

setUpTheme();
new App().start().catch((error) => {
  byId("failure").textContent = error.message;
  byId("failure").hidden = false;
});
