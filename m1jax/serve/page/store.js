// Conversations and settings, kept in the browser.

const CONVERSATIONS = "m1jax.conversations";
const SETTINGS = "m1jax.settings";

function read(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export const conversations = read(CONVERSATIONS, []);

export function save() {
  for (;;) {
    try {
      localStorage.setItem(CONVERSATIONS, JSON.stringify(conversations));
      return;
    } catch {
      if (conversations.length < 2) return; // this one alone is too much
      conversations.pop(); // the oldest makes room
    }
  }
}

export const settings = { system: "", temperature: 1, max_tokens: null, thinking_budget: null, tools: [] };
Object.assign(settings, read(SETTINGS, {}));

export function saveSettings() {
  localStorage.setItem(SETTINGS, JSON.stringify(settings));
}
