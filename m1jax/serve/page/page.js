// The conversation.

import * as api from "./api.js";
import * as playground from "./playground.js";
import { conversations, save, saveSettings, settings } from "./store.js";
import { button, element, rich } from "./view.js";

const byId = (name) => document.getElementById(name);
let current = null;
let controller = null; // of the reply that is being written

// Messages are as the server takes them, so that they can be sent as they are.

function start() {
  current = { id: crypto.randomUUID?.() ?? String(Date.now()), messages: [] };
  showAll();
}

function keep() {
  const at = conversations.findIndex((each) => each.id === current.id);
  if (at >= 0) conversations.splice(at, 1);
  if (current.messages.length) conversations.unshift(current);
  save();
  showList();
}

function showList() {
  byId("conversations").replaceChildren(
    ...conversations.map((each) => {
      const title = each.messages.find((message) => message.role === "user")?.content ?? "";
      const open = button(title.slice(0, 60) || "…", () => ((current = each), stop(), closeMenu(), showAll()), "Open");
      open.classList.add("open");
      if (each.id === current.id) open.setAttribute("aria-current", "true");
      const remove = button("×", () => forget(each), "Delete this conversation");
      remove.classList.add("delete");
      return element("li", {}, open, remove);
    }),
  );
}

function forget(conversation) {
  conversations.splice(conversations.indexOf(conversation), 1);
  save();
  if (conversation.id === current.id) (stop(), start());
  else showList();
}

function showAll() {
  showList();
  byId("messages").replaceChildren(...current.messages.map(show));
  byId("messages").lastElementChild?.scrollIntoView();
}

function show(message, index) {
  const item = element("li", { className: message.role });
  fill(item, message, index);
  return item;
}

function fill(item, message, index) {
  if (message.role === "user") {
    item.replaceChildren(
      element("div", { className: "text", textContent: message.content }),
      element("div", { className: "tools" }, button("Edit", () => edit(index), "Edit and ask again")),
    );
    return;
  }
  if (message.role === "tool") {
    item.replaceChildren(element("div", { className: "call" }, `Result: ${message.content}`));
    return;
  }
  const open = item.querySelector("details")?.open ?? false;
  item.replaceChildren();
  if (message.reasoning_content) {
    const thought = element("div", { className: "text", textContent: message.reasoning_content });
    item.append(element("details", { open }, element("summary", { textContent: "Thought" }), thought));
  }
  if (message.content) item.append(rich(message.content, playground.run));
  for (const call of message.tool_calls ?? []) item.append(showCall(call, index));
  if (message.error) item.append(element("p", { className: "error", textContent: message.error }));
}

function showCall(call, index) {
  const code = element("code", { textContent: `${call.function.name}(${call.function.arguments})` });
  const box = element("div", { className: "call" }, code);
  if (current.messages.slice(index + 1).some((message) => message.tool_call_id === call.id)) return box;
  const result = element("input", { placeholder: "Its result. Enter sends it.", ariaLabel: `Result of ${call.function.name}` });
  result.onkeydown = (event) => {
    if (event.key === "Enter" && !controller) answer(call, result.value, index);
  };
  box.append(result);
  return box;
}

// What a tool has found; once all calls of a turn are answered, the model goes on.
function answer(call, content, index) {
  let at = index + 1;
  while (current.messages[at]?.role === "tool") at += 1;
  current.messages.splice(at, 0, { role: "tool", tool_call_id: call.id, content });
  keep();
  showAll();
  const answered = new Set(current.messages.filter((m) => m.role === "tool").map((m) => m.tool_call_id));
  if (current.messages[index].tool_calls.every((each) => answered.has(each.id))) reply();
}

function edit(index) {
  stop();
  byId("said").value = current.messages[index].content;
  current.messages.length = index;
  keep();
  showAll();
  byId("said").focus();
}

function ask() {
  const said = byId("said").value.trim();
  if (!said || controller) return;
  byId("said").value = "";
  current.messages.push({ role: "user", content: said });
  keep();
  showAll();
  reply();
}

async function reply() {
  const mine = (controller = new AbortController());
  const conversation = current;
  const message = { role: "assistant", content: "" };
  const sent = conversation.messages.map(({ error, ...rest }) => rest).filter((each) => each.role !== "assistant" || each.content || each.tool_calls || each.reasoning_content);
  conversation.messages.push(message);
  const item = show(message, conversation.messages.length - 1);
  byId("messages").append(item);
  busy(true);
  let tokens = 0;
  let first = null;
  let due = false;
  const draw = () => {
    due = false;
    const list = byId("messages");
    const end = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
    fill(item, message, conversation.messages.length - 1);
    if (end) list.scrollTop = list.scrollHeight;
    const seconds = (performance.now() - first) / 1000;
    byId("status").textContent = `${tokens} tokens` + (seconds > 0.2 ? `, ${(tokens / seconds).toFixed(1)} tokens/s` : "");
  };
  try {
    await api.chat(request(sent), mine.signal, (choice) => {
      first ??= performance.now();
      tokens += choice.token_ids?.length ?? 0;
      message.content += choice.delta.content ?? "";
      if (choice.delta.reasoning_content) message.reasoning_content = (message.reasoning_content ?? "") + choice.delta.reasoning_content;
      for (const { index, ...call } of choice.delta.tool_calls ?? []) (message.tool_calls ??= []).push(call);
      if (!due) ((due = true), requestAnimationFrame(draw));
    });
  } catch (error) {
    message.error = error.message;
  }
  draw();
  if (controller === mine) (controller = null), busy(false);
  save();
  if (current === conversation) (keep(), item.querySelector(".call input")?.focus());
}

function request(messages) {
  const found = { temperature: settings.temperature, messages };
  if (settings.system) found.messages = [{ role: "system", content: settings.system }, ...messages];
  for (const name of ["max_tokens", "thinking_budget"]) if (settings[name]) found[name] = settings[name];
  if (settings.tools.length) found.tools = settings.tools;
  return found;
}

function stop() {
  controller?.abort();
  controller = null;
  busy(false);
}

function busy(writing) {
  byId("send").hidden = writing;
  byId("stop").hidden = !writing;
}

function closeMenu() {
  document.body.classList.remove("menu");
  byId("menu").setAttribute("aria-expanded", "false");
}

function openSettings() {
  const fields = byId("settings").querySelector("form").elements;
  for (const name of ["system", "temperature", "max_tokens", "thinking_budget"]) fields[name].value = settings[name] ?? "";
  fields.tools.value = settings.tools.length ? JSON.stringify(settings.tools, null, 1) : "";
  fields.key.value = api.key.get();
  byId("settings-error").textContent = "";
  byId("settings").showModal();
}

byId("settings").querySelector("form").onsubmit = (event) => {
  if (event.submitter?.value !== "save") return;
  const fields = event.target.elements;
  try {
    const tools = JSON.parse(fields.tools.value.trim() || "[]");
    if (!Array.isArray(tools)) throw new Error("a list is expected");
    settings.tools = tools;
  } catch (error) {
    event.preventDefault();
    byId("settings-error").textContent = `Tools: ${error.message}`;
    return;
  }
  settings.system = fields.system.value;
  settings.temperature = fields.temperature.value === "" ? 1 : Number(fields.temperature.value);
  for (const name of ["max_tokens", "thinking_budget"]) settings[name] = Number(fields[name].value) || null;
  saveSettings();
  api.key.set(fields.key.value);
  greet();
};

async function greet() {
  try {
    byId("model").textContent = document.title = await api.model();
    byId("status").textContent = "";
  } catch (error) {
    byId("status").textContent = error.message;
  }
}

byId("ask").onsubmit = (event) => (event.preventDefault(), ask());
byId("said").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) (event.preventDefault(), ask());
};
byId("stop").onclick = stop;
byId("new").onclick = () => (stop(), start(), closeMenu(), byId("said").focus());
byId("open-settings").onclick = openSettings;
byId("menu").onclick = () => {
  byId("menu").setAttribute("aria-expanded", String(document.body.classList.toggle("menu")));
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && controller) stop();
});
start();
greet();
byId("said").focus();
