// The server as the page sees it. Addresses are relative, so that it also works behind a proxy's prefix.

const KEY = "dashinfer-api-key";

// What the server answered instead of what was asked for; `status` is 0 when it could not be reached.
export class ServerError extends Error {
  constructor(status, error) {
    super(error?.message ?? `the server answered with status ${status}`);
    this.status = status;
    this.code = error?.code ?? null;
  }
}

// The key is kept for as long as the tab is open, or until it is changed when the user wants that.
export function saveKey(key, remember) {
  sessionStorage.setItem(KEY, key);
  if (remember) localStorage.setItem(KEY, key);
  else localStorage.removeItem(KEY);
}

// Name, context and picture sizes of the model that is served.
export async function describeModel() {
  return (await request("page/model.json")).json();
}

// Yields {reasoning} and {text} for each piece of the answer, {usage} and {finish}; raises ServerError, or AbortError after `signal`.
export async function* answer(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ServerError(response.status, event.error);
    yield* news(event);
  }
  throw new ServerError(0, { message: "the connection broke before the answer was complete" });
}

function* news(event) {
  const choice = event.choices[0];
  if (choice?.delta.reasoning_content) yield { reasoning: choice.delta.reasoning_content };
  if (choice?.delta.content) yield { text: choice.delta.content };
  if (choice?.finish_reason) yield { finish: choice.finish_reason };
  if (event.usage) yield { usage: event.usage };
}

async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, { message: "the server cannot be reached; is it running?" });
  }
  if (!response.ok) throw new ServerError(response.status, (await response.json().catch(() => null))?.error);
  return response;
}

// The data of server-sent events, one line each as this server writes them.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
  }
}
