// The attention of an answer's tokens on the image, as the server measures it, by word and by look.

// `measured` is the answer of /v1/reattention/attention; only its first image is shown.
export class Attention {
  constructor(measured) {
    const [image] = measured.images;
    this.rows = image.rows;
    this.cols = image.cols;
    this.original = floats(image.original);
    this.inserted = floats(image.inserted);
    this.shares = measured.tokens.map((_, token) => ({
      original: measured.original[token],
      inserted: measured.inserted[token],
      even: measured.even_original[token] + measured.even_inserted[token],
    }));
    this.insertions = measured.insertions;
    this.starts = [];
    let at = 0;
    for (const text of measured.tokens) {
      this.starts.push(at);
      at += text.length;
    }
    this.end = at;
  }

  get tokens() {
    return this.starts.length;
  }

  // The tokens that write the characters from `start` to `end`.
  tokensAt(start, end) {
    const result = [];
    this.starts.forEach((from, token) => {
      const to = this.starts[token + 1] ?? this.end;
      if (from < end && to > start) result.push(token);
    });
    return result;
  }

  // The queries that write a word: the tokens before its own. The prompt's last token writes the first token, and is no
  // token of the answer, so that nothing is known of it.
  writersOf(word) {
    return this.tokensAt(word.start, word.end).filter((token) => token > 0).map((token) => token - 1);
  }

  // Means over query tokens: { original, inserted, even, maps: { original, inserted } }, or null of none.
  mean(queries) {
    if (!queries.length) return null;
    const size = this.rows * this.cols;
    const result = { original: 0, inserted: 0, even: 0, maps: { original: zeros(size), inserted: zeros(size) } };
    for (const query of queries) {
      for (const name of ["original", "inserted", "even"]) result[name] += this.shares[query][name] / queries.length;
      for (const name of ["original", "inserted"]) {
        const from = query * size;
        for (let cell = 0; cell < size; cell++) result.maps[name][cell] += this[name][from + cell] / queries.length;
      }
    }
    return result;
  }

  // Before a look and in its reflection, over the tokens that the server takes for `before` and `after`: since the
  // look before, and from the tag to the reflection's end.
  ofLook(number, text) {
    const position = this.insertions[number].position;
    const since = number ? this.insertions[number - 1].position : 0;
    const from = this.starts[position] + "<REFLECTION>".length;
    const ends = ["</REFLECTION>", "<REFLECTION>"].map((tag) => {
      const at = text.indexOf(tag, from);
      return at < 0 ? this.end : at + (tag.startsWith("</") ? tag.length : 0);
    });
    const inside = this.tokensAt(this.starts[position], Math.min(...ends));
    return { before: this.mean(range(since, position)), after: this.mean(inside) };
  }
}

function floats(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Float32Array(bytes.buffer); // little-endian, as all machines with a browser are
}

const zeros = (size) => new Float32Array(size);
const range = (from, to) => Array.from({ length: Math.max(to - from, 0) }, (_, i) => from + i);

export const both = (maps) => maps.original.map((value, cell) => value + maps.inserted[cell]);
