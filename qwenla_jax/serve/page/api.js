// What the server is asked. The key is kept in this module alone, and is gone with the tab.

let key = "";

export const setKey = (value) => (key = value.trim());

export class ServerError extends Error {
  constructor(message, status, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

const headers = () => ({ "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) });

async function call(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is it still running?", 0);
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const text = await response.text().catch(() => "");
  let message;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    message = text.slice(0, 300) || response.statusText;
  }
  return new ServerError(message, response.status, Number(response.headers.get("Retry-After")) || null);
}

export async function settings() {
  return (await call("page/settings.json")).json();
}

// "ready", or why not.
export async function health() {
  try {
    await call("health");
    return "ready";
  } catch (error) {
    return error.status === 503 ? error.message : "unreachable";
  }
}

export async function attention(body, signal) {
  const options = { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
  return (await call("v1/reattention/attention", options)).json();
}

// Streams an answer. Calls `onText` with all of the text so far.
// Returns { text, ids, insertions, reason, usage }.
export async function chat(body, onText, signal) {
  const options = { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
  const response = await call("v1/chat/completions", options);
  const answer = { text: "", ids: [], insertions: [], reason: null, usage: null };
  for await (const event of events(response.body)) {
    if (event.error) throw new ServerError(event.error.message, 500);
    answer.usage = event.usage ?? answer.usage;
    for (const choice of event.choices ?? []) {
      if (choice.delta?.content) {
        answer.text += choice.delta.content;
        onText(answer.text);
      }
      answer.ids.push(...(choice.token_ids ?? []));
      answer.insertions = choice.delta?.insertions ?? answer.insertions;
      answer.reason = choice.finish_reason ?? answer.reason;
    }
  }
  if (answer.reason === null) throw new ServerError("The connection ended before the answer did.", 0);
  return answer;
}

// The data of server-sent events; each is one line here.
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
