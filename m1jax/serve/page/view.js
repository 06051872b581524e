// Elements. Whatever a model wrote becomes text nodes, never markup.

export function element(name, properties = {}, ...children) {
  const found = Object.assign(document.createElement(name), properties);
  found.append(...children);
  return found;
}

export function button(label, click, title = label) {
  return element("button", { type: "button", textContent: label, title, onclick: click });
}

// A text with its fenced blocks of code; `run` takes the HTML of one.
export function rich(text, run) {
  const found = element("div");
  let end = 0;
  // A block that is still being written reaches to the end.
  for (const match of text.matchAll(/^```([^\n`]*)\n([\s\S]*?)(?:^```[ \t]*$|$(?![\s\S]))/gm)) {
    found.append(...plain(text.slice(end, match.index), run), block(match[2], match[1].trim(), run));
    end = match.index + match[0].length;
  }
  found.append(...plain(text.slice(end), run));
  return found;
}

function plain(text, run) {
  if (!text.trim()) return [];
  if (/^\s*(<!doctype html|<html)/i.test(text)) return [block(text, "html", run)];
  return [element("div", { className: "text", textContent: text.replace(/^\n+|\n+$/g, "") })];
}

function block(code, language, run) {
  const found = element("div", { className: "code" }, element("pre", {}, element("code", { textContent: code })));
  found.append(button("Copy", () => navigator.clipboard?.writeText(code)));
  if (language === "html" || /<(html|body|script|style|svg)\b/i.test(code)) {
    found.append(" ", button("Run", () => run(code), "Run in the playground"));
  }
  return found;
}
