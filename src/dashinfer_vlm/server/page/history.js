// The list of chats that this browser keeps.

import { byId, el, iconButton } from "./dom.js";

const DAY_MS = 24 * 3600 * 1000;

export function showHistory(chats, { current, onopen, ondelete }) {
  const groups = Map.groupBy(chats, (chat) => age(chat.updated));
  const sections = [...groups].map(([title, members]) =>
    el("section", {}, el("h3", {}, title), el("ul", {}, ...members.map((chat) => entry(chat, { current, onopen, ondelete })))),
  );
  byId("history").replaceChildren(...sections);
}

function entry(chat, { current, onopen, ondelete }) {
  const open = el("button", { type: "button", class: "chat", "aria-current": chat.id === current && "true", onclick: () => onopen(chat) }, chat.title);
  const remove = iconButton("trash", `Delete “${chat.title}”`, () => confirmed(chat, ondelete));
  return el("li", {}, open, remove);
}

function confirmed(chat, ondelete) {
  const dialog = byId("delete-dialog");
  byId("delete-title").textContent = chat.title;
  byId("delete-form").onsubmit = () => {
    if (byId("delete-form").dataset.choice === "delete") ondelete(chat);
  };
  for (const button of dialog.querySelectorAll("button")) {
    button.onclick = () => (byId("delete-form").dataset.choice = button.value);
  }
  dialog.showModal();
}

function age(time) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (time >= today) return "Today";
  if (time >= today - DAY_MS) return "Yesterday";
  return time >= today - 7 * DAY_MS ? "This week" : "Earlier";
}
