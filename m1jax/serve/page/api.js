// The server, as the page knows it.

export const key = {
  get: () => sessionStorage.getItem("key") ?? "",
  set: (value) => sessionStorage.setItem("key", value),
};

function headers() {
  const found = { "Content-Type": "application/json" };
  if (key.get()) found.Authorization = `Bearer ${key.get()}`;
  return found;
}

async function failure(response) {
  const body = await response.json().catch(() => null);
  return new Error(body?.error?.message ?? `The server answers ${response.status}.`);
}

export async function model() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (!response.ok) throw await failure(response);
  return (await response.json()).data[0].id;
}

// Calls `take` with each piece of a reply; ends early, without an error, where `signal` says so.
export async function chat(request, signal, take) {
  const body = JSON.stringify({ ...request, stream: true, return_token_ids: true });
  try {
    const response = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body, signal });
    if (!response.ok) throw await failure(response);
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.choices.length) take(chunk.choices[0]);
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  }
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) if (block.startsWith("data: ")) yield block.slice(6);
  }
}
