// What the user prefers: parameters of the next answers, light or dark, the API key.

import { saveKey } from "./api.js";
import { byId, icon } from "./dom.js";

const PARAMETERS = "dashinfer-parameters";
const THEME = "dashinfer-theme";
const NUMBERS = { temperature: "temperature", top_p: "top-p", max_completion_tokens: "max-tokens" };
const THEMES = { system: "dark", dark: "light", light: "system" };
const THEME_NAMES = { system: "as the system", dark: "dark", light: "light" };

// The fields of the panel, kept across reloads.
export class Parameters {
  constructor() {
    this.fields = [...byId("parameters").querySelectorAll("input, textarea")];
    const saved = JSON.parse(localStorage.getItem(PARAMETERS) ?? "{}");
    for (const field of this.fields) field.value = saved[field.id] ?? "";
    byId("parameters").addEventListener("input", () => this.changed());
    byId("parameters").addEventListener("submit", (event) => event.preventDefault());
    byId("reset").addEventListener("click", () => this.reset());
    byId("schema-chip").addEventListener("click", () => {
      setPanel(true);
      byId("schema").focus();
    });
    this.changed();
  }

  get system() {
    return byId("system").value.trim();
  }

  get isStructured() {
    return byId("schema").value.trim() !== "";
  }

  // Whether every field makes sense; shows and focuses the first that does not.
  check() {
    if (byId("parameters").checkValidity()) return true;
    setPanel(true);
    byId("parameters").reportValidity();
    return false;
  }

  // The fields of a request that are not left to the model.
  request() {
    const sent = {};
    for (const [name, id] of Object.entries(NUMBERS)) if (byId(id).value !== "") sent[name] = byId(id).valueAsNumber;
    if (this.isStructured) {
      const schema = JSON.parse(byId("schema").value);
      sent.response_format = { type: "json_schema", json_schema: { name: "answer", strict: true, schema } };
    }
    return sent;
  }

  reset() {
    for (const field of this.fields) field.value = "";
    this.changed();
  }

  changed() {
    const values = Object.fromEntries(this.fields.map((field) => [field.id, field.value]));
    localStorage.setItem(PARAMETERS, JSON.stringify(values));
    const problem = this.isStructured ? problemOf(byId("schema").value) : "";
    byId("schema").setCustomValidity(problem);
    byId("schema-problem").textContent = problem;
    byId("schema").setAttribute("aria-invalid", String(problem !== ""));
    byId("schema-chip").hidden = !this.isStructured;
  }
}

// Light, dark, or whatever the system says.
export function setUpTheme() {
  const button = byId("theme");
  const show = (theme) => {
    document.documentElement.dataset.theme = theme;
    const label = `Colours: ${THEME_NAMES[theme]}`;
    button.title = label;
    button.setAttribute("aria-label", label);
    button.replaceChildren(icon(`theme-${theme}`));
  };
  button.addEventListener("click", () => {
    const theme = THEMES[document.documentElement.dataset.theme];
    localStorage.setItem(THEME, theme);
    show(theme);
  });
  show(localStorage.getItem(THEME) ?? "system");
}

// Open or close the panel of parameters.
export function setPanel(open) {
  byId("panel").hidden = !open;
  byId("panel-toggle").setAttribute("aria-expanded", String(open));
}

// Ask until the user gives a key; `isWrong` says that the last one was refused.
export function askForKey(isWrong) {
  const dialog = byId("key-dialog");
  byId("key-problem").textContent = isWrong ? "The server does not know this key." : "";
  dialog.oncancel = (event) => event.preventDefault(); // without a key there is nothing to go back to
  dialog.showModal();
  return new Promise((resolve) => {
    byId("key-form").onsubmit = () => {
      saveKey(byId("key").value.trim(), byId("remember").checked);
      resolve();
    };
  });
}

function problemOf(text) {
  try {
    const schema = JSON.parse(text);
    return schema && typeof schema === "object" && !Array.isArray(schema) ? "" : "A schema is a JSON object.";
  } catch (error) {
    return `This is no JSON: ${error.message}`;
  }
}
