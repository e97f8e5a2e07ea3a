// The question as a curl command and as a Python program.

const quoted = JSON.stringify;

// `body` is the request with a single image; `media` its type, `file` the image's name, `base` the server's address.
export function curl(body, { media, file, base, key }) {
  const escaped = (text) => text.replace(/[\\$`]/g, "\\$&"); // in a here-document
  const marker = "IMAGE-GOES-HERE";
  const text = escaped(JSON.stringify(withImage(body, marker), null, 1));
  const data = `data:${media};base64,$(base64 < ${file} | tr -d '\\n')`;
  return [
    `curl ${base}v1/chat/completions -H 'Content-Type: application/json' \\`,
    ...(key ? [`  -H "Authorization: Bearer $QWENLA_API_KEY" \\`] : []),
    "  -d @- <<EOF",
    text.replace(marker, () => data),
    "EOF",
    "",
  ].join("\n");
}

export function python(body, { media, file, base, key }) {
  const question = body.messages[0].content.find((part) => part.type === "text").text;
  const { mode, keep_ratio: keep, max_insertions: most } = body.reattention;
  const look = [`"mode": ${quoted(mode)}`, ...(mode === "route" ? [`"keep_ratio": ${keep}`] : []), `"max_insertions": ${most}`];
  return `import base64
${key ? "import os\n" : ""}
from openai import OpenAI

client = OpenAI(base_url=${quoted(`${base}v1`)}, api_key=${key ? 'os.environ["QWENLA_API_KEY"]' : '"none"'})
with open(${quoted(file)}, "rb") as stream:
    image = base64.b64encode(stream.read()).decode()
answer = client.chat.completions.create(
    model=${quoted(body.model)},
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": f"data:${media};base64,{image}"}},
                {"type": "text", "text": ${quoted(question)}},
            ],
        }
    ],
    temperature=${body.temperature},
    seed=${body.seed},
    max_tokens=${body.max_tokens},
    extra_body={"reattention": {${look.join(", ")}}},
)
message = answer.choices[0].message
print(message.reasoning)
print(message.content)
print(message.insertions)
`;
}

function withImage(body, url) {
  const messages = body.messages.map((message) => ({
    ...message,
    content: message.content.map((part) => (part.type === "image_url" ? { ...part, image_url: { url } } : part)),
  }));
  return { ...body, messages };
}
