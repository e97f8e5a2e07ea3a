// An answer's text as sections, complete or not yet, and as words.

const NAMES = ["SUMMARY", "CAPTION", "REASONING", "CONCLUSION", "REFLECTION"];
const TAG = new RegExp(`<(/?)(${NAMES.join("|")})>`, "g");

// The parts of a text in order: { name, text, start, open }. `start` is the index of `text`'s first character.
// A section is an opening tag and its own closing tag with no tag in between; `open` marks one that the text ends in.
// What is outside of every section has name null and keeps its tags. While the answer is `streaming`, an end that may be
// the beginning of a tag is left out.
export function partsOf(text, streaming = false) {
  if (streaming) text = withoutHalfTag(text);
  const tags = [...text.matchAll(TAG)];
  const parts = [];
  let done = 0;
  const outside = (end) => {
    if (text.slice(done, end).trim()) parts.push({ name: null, text: text.slice(done, end), start: done, open: false });
    done = Math.max(done, end);
  };
  tags.forEach((tag, i) => {
    if (tag[1]) return;
    const next = tags[i + 1];
    const start = tag.index + tag[0].length;
    if (next && !(next[1] && next[2] === tag[2])) return;
    outside(tag.index);
    parts.push({ name: tag[2], text: text.slice(start, next ? next.index : text.length), start, open: !next });
    done = next ? next.index + next[0].length : text.length;
  });
  outside(text.length);
  return parts;
}

function withoutHalfTag(text) {
  const at = text.lastIndexOf("<");
  return at >= 0 && text.length - at < 14 && !text.includes(">", at) ? text.slice(0, at) : text;
}

// The words of a part: { text, start, end } with indices in the whole answer.
export function wordsOf(part) {
  return [...part.text.matchAll(/\S+/g)].map((match) => {
    const start = part.start + match.index;
    return { text: match[0], start, end: start + match[0].length };
  });
}

// Where the reflections begin: the indices of their tags.
export function reflectionsOf(text) {
  return [...text.matchAll(/<REFLECTION>/g)].map((match) => match.index);
}

export function conclusionOf(text) {
  const conclusions = partsOf(text).filter((part) => part.name === "CONCLUSION" && !part.open);
  return conclusions.length ? conclusions[conclusions.length - 1].text.trim() : null;
}
