// Chats in the browser's own database. Pictures and videos are rows of their own: a turn that grows rewrites none of them.
//
//   chats   {id, title, updated, turns: [{role, text, reasoning, media: [{id, kind, name, width, height} | {url, kind}], ...}]}
//   media   {id, chat, blob}

const NAME = "dashinfer-vlm";

let opened = null;

export async function listChats() {
  const chats = await run("chats", "readonly", (store) => store.getAll());
  return chats.sort((a, b) => b.updated - a.updated);
}

export function loadChat(id) {
  return run("chats", "readonly", (store) => store.get(id));
}

export function saveChat(chat) {
  return run("chats", "readwrite", (store) => store.put(chat));
}

export async function deleteChat(id) {
  await run("chats", "readwrite", (store) => store.delete(id));
  const keys = await run("media", "readonly", (store) => store.index("chat").getAllKeys(id));
  for (const key of keys) await run("media", "readwrite", (store) => store.delete(key));
}

export function saveMedium(id, chat, blob) {
  return run("media", "readwrite", (store) => store.put({ id, chat, blob }));
}

// The bytes of a picture or video; null when the browser has dropped them.
export async function loadMedium(id) {
  return (await run("media", "readonly", (store) => store.get(id)))?.blob ?? null;
}

function open() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("chats", { keyPath: "id" });
      request.result.createObjectStore("media", { keyPath: "id" }).createIndex("chat", "chat");
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function run(name, mode, work) {
  const transaction = (await open()).transaction(name, mode);
  const request = work(transaction.objectStore(name));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}
