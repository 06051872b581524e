// HTML runs in a frame without our origin, and behind a policy that lets nothing out (see pages.py).

import { button, element } from "./view.js";

const EXAMPLES = { "Flip card": "flip-card", Particles: "particles", "Typing speed": "typing-speed", Maze: "maze" };
const byId = (name) => document.getElementById(name);

let opener = null;

export function open() {
  if (byId("playground").hidden) opener = document.activeElement;
  byId("playground").hidden = false;
  document.body.classList.add("playing");
  byId("source").focus();
}

export function close() {
  stop();
  byId("playground").hidden = true;
  document.body.classList.remove("playing");
  opener?.focus();
}

export function run(html) {
  open();
  byId("source").value = html;
  const frame = element("iframe", { title: "What the HTML shows", src: "/page/preview.html" });
  frame.sandbox = "allow-scripts";
  frame.referrerPolicy = "no-referrer";
  frame.allow = "";
  const ready = (event) => {
    if (event.source !== frame.contentWindow || event.data !== "ready") return;
    removeEventListener("message", ready);
    frame.contentWindow.postMessage(html, "*"); // its origin has no name
  };
  addEventListener("message", ready);
  byId("frame").replaceChildren(frame);
}

function stop() {
  byId("frame").replaceChildren();
}

byId("open-playground").onclick = open;
byId("close-playground").onclick = close;
byId("run").onclick = () => run(byId("source").value);
byId("halt").onclick = stop;
byId("playground").addEventListener("keydown", (event) => {
  if (event.key === "Escape") close();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run(byId("source").value);
});
for (const [label, file] of Object.entries(EXAMPLES)) {
  byId("gallery").append(
    button(label, async () => run(await (await fetch(`/page/examples/${file}.html`)).text()), `Run the example: ${label}`),
  );
}
