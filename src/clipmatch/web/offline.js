// The backend of a gallery that was given away as a folder: all of it happens in the page, nothing is sent anywhere.
// In: the scripts in data/, each of which calls gallery(name, value). Out: `backend`, as app.js expects it.
// What is known of the photographs is read at once; the model (tens of megabytes) in the background, or by the first
// query if that comes sooner.

import { blend, confidences, cosines, learn, order, rowAt, stacks, sum, unit } from "./ranking.js";

const WEIGHT = /^(.*[^\s\d])\s*:(\d+(?:\.\d+)?)$/s; // as in query.py
const REMEMBERED = 50; // sentences whose vectors are kept
const PAUSE = 400; // milliseconds that the first pictures have for themselves

// Data ----------------------------------------------------------------------------------------------------------------

const arrived = new Map();
const asked = new Map();
window.gallery = (name, value) => arrived.set(name, value);

/** What data/NAME.js hands over; read once. */
function data(name) {
  if (!asked.has(name)) {
    asked.set(name, read(name).catch((error) => {
      asked.delete(name); // so that the next try reads it again
      throw error;
    }));
  }
  return asked.get(name);
}

function read(name) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    const missing = () => reject(new Error(`The file data/${name}.js can't be read; copy the gallery's folder again.`));
    script.src = `data/${name}.js`;
    script.onerror = missing;
    script.onload = () => {
      const value = arrived.get(name);
      arrived.delete(name);
      value === undefined ? missing() : resolve(value); // a script that was cut off calls nothing
      script.remove();
    };
    document.head.append(script);
  });
}

/** Base64 -> bytes. */
function bytes(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const raw = atob(text);
  const made = new Uint8Array(raw.length);
  for (let at = 0; at < raw.length; at++) made[at] = raw.charCodeAt(at);
  return made;
}

function rowsOf({ codes, scales }, dim) {
  return { codes: new Int8Array(bytes(codes).buffer), scales: new Float32Array(bytes(scales).buffer), dim };
}

/** A function that is called at most once, unless it fails. */
function once(make) {
  let made = null;
  return () => {
    made ??= make().catch((error) => {
      made = null;
      throw error;
    });
    return made;
  };
}

const vectors = once(async () => {
  const found = await data("search");
  asked.delete("search"); // the text need not stay
  const calibration = found.calibration;
  return {
    rows: rowsOf(found, found.dim),
    hashes: new Uint32Array(bytes(found.hashes).buffer),
    near: found.near,
    background: found.background && new Float32Array(bytes(found.background).buffer),
    calibration: calibration && { ...calibration, bank: rowsOf(calibration.bank, found.dim) },
    longest: found.longest,
  };
});

// Sentences -----------------------------------------------------------------------------------------------------------

const encoder = once(async () => {
  const [{ InferenceSession, Tensor, Tokenizer, env }, binary, graph, words, { longest }] = await Promise.all([
    data("runtime"),
    data("wasm"),
    data("model"),
    data("tokenizer"),
    vectors(),
  ]);
  env.wasm.numThreads = 1; // more of them need a server that isolates the page
  env.wasm.wasmBinary = bytes(binary).buffer;
  const session = await InferenceSession.create(bytes(graph), { executionProviders: ["wasm"], logSeverityLevel: 3 });
  env.wasm.wasmBinary = undefined;
  for (const name of ["wasm", "model", "tokenizer"]) asked.delete(name); // a good hundred megabytes of text
  return { session, Tensor, tokenizer: new Tokenizer(words, {}), longest };
});

const remembered = new Map();
let turn = Promise.resolve();

/** A sentence -> its unit vector. */
async function embed(text) {
  if (!remembered.has(text)) {
    turn = turn.catch(() => {}).then(() => run(text)); // one at a time
    const row = await turn;
    if (remembered.size >= REMEMBERED) remembered.delete(remembered.keys().next().value);
    remembered.set(text, row);
  }
  return remembered.get(text);
}

async function run(text) {
  const { session, Tensor, tokenizer, longest } = await encoder();
  const ids = tokens(tokenizer, text, longest);
  const tensor = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, ids.length]);
  const found = await session.run({ input_ids: tensor(ids), attention_mask: tensor(ids.map(() => 1)) }, ["embedding"]);
  return Float32Array.from(found.embedding.data);
}

/** Text -> ids, at most so many, with the special tokens at both ends. */
function tokens(tokenizer, text, most) {
  const around = tokenizer.encode("").ids;
  const whole = tokenizer.encode(text).ids;
  const plain = tokenizer.encode(text, { add_special_tokens: false }).ids;
  const before = around.findIndex((_, at) => plain.every((id, next) => whole[at + next] === id));
  const first = before < 0 ? around.length : before;
  return [...around.slice(0, first), ...plain.slice(0, most - around.length), ...around.slice(first)];
}

// Photographs ---------------------------------------------------------------------------------------------------------

const photographs = once(() => data("photos"));

function photo(known, place) {
  const path = known.path[place];
  const picture = `${known.picture[place]}.jpg`;
  return {
    id: place,
    name: path.slice(path.lastIndexOf("/") + 1),
    path,
    size: known.bytes[place],
    width: known.width[place],
    height: known.height[place],
    taken: known.taken[place],
    camera: null,
    caption: known.caption[place],
    thumb: `thumbs/${picture}`,
    full: `${known.full ? "full" : "thumbs"}/${picture}`,
  };
}

/** The places that pass a filter. Dates are compared as texts: 2023 comes before 2023-06-15T12:30:00. */
function passing(known, where) {
  const { after, before, minSide: side, minSize: weight, hasCaption: captioned } = where ?? {};
  const passes = (place) =>
    (!after || (known.taken[place] ?? "") >= after) &&
    (!before || (known.taken[place] ?? "~") < before) &&
    (!side || Math.min(known.width[place], known.height[place]) >= side) &&
    (!weight || known.bytes[place] >= weight) &&
    (!captioned || known.caption[place] !== null);
  return Array.from(known.path.keys()).filter(passes);
}

/** Newest first, those without a date last. */
function newest(known, places) {
  return places.sort((one, other) => {
    const [first, second] = [known.taken[one] ?? "", known.taken[other] ?? ""];
    return first === second ? other - one : first < second ? 1 : -1;
  });
}

function page(items, number, size) {
  return items.slice((number - 1) * size, number * size);
}

/** A sentence and a photograph, or one of them -> their vectors and weights. */
async function termsOf(text, like, rows) {
  const terms = [];
  if (text) {
    const [, what, weight] = WEIGHT.exec(text) ?? [text, text, "1"];
    terms.push({ row: await embed(what.trim()), weight: Number(weight) || 1 });
  }
  if (like !== null) terms.push({ row: unit(rowAt(rows, like)), weight: 1 });
  return terms;
}

// Matches -------------------------------------------------------------------------------------------------------------

let last = { key: null, ranking: null }; // so that a second page need not search again

/** All matches in order, those of a request: {order, scores, confidences} over places, and stacks as far as asked. */
async function ranking({ query, like, liked, disliked, where, minConfidence }, signal) {
  const key = JSON.stringify([query, like, liked, disliked, where, minConfidence]);
  if (last.key === key) return last.ranking;
  const [known, found] = await Promise.all([photographs(), vectors()]);
  const { rows, hashes, near, background, calibration } = found;
  const terms = await termsOf(query.trim(), like, rows);
  signal?.throwIfAborted();
  const ticked = liked.length + disliked.length > 0;
  const meant = terms.length ? sum(terms) : null;
  if (ticked && !liked.length && !meant) throw new Error("Crosses alone say nothing; tick what you are looking for.");
  const row = ticked ? learn(rows, liked, disliked, meant) : meant;
  const places = passing(known, where);
  const mixed = terms.length > 1 && !ticked;
  const scores = mixed ? blend(rows, terms, places) : cosines(rows, row, places);
  const sure = calibration && background && !ticked && like === null && places.length;
  const chances = sure ? confidences(calibration, background, rows, row, places, scores) : null;
  let best = order(chances ?? scores, scores);
  const first = best[0];
  if (chances && minConfidence) best = best.filter((index) => chances[index] >= minConfidence);
  const index = new Map(places.map((place, at) => [place, at]));
  const match = (place, duplicates) => ({
    ...photo(known, place),
    score: scores[index.get(place)],
    confidence: chances ? chances[index.get(place)] : null,
    duplicates,
  });
  const coming = stacks(Uint32Array.from(best, (at) => places[at]), rows, hashes, near);
  const made = {
    searched: places.length,
    best: first === undefined ? null : match(places[first], 0),
    matches: [],
    /** At least so many matches, unless there are less. */
    upTo(count) {
      while (made.matches.length < count) {
        const { value, done } = coming.next();
        if (done) break;
        made.matches.push(match(value[0], value.length - 1));
      }
      return made.matches;
    },
  };
  last = { key, ranking: made };
  return made;
}

export const backend = {
  features: {
    refine: true,
    concepts: false,
    explain: false,
    filters: true,
    statistics: false,
    duplicates: false,
    exclude: false,
    image: false,
    hybrid: false,
    camera: false,
  },

  async status() {
    const known = await photographs();
    setTimeout(() => encoder().catch(() => {}), PAUSE); // a failure is told by the query that needs it
    return { photos: known.path.length, model: known.model, calibrated: known.calibrated, folders: [] };
  },

  async search(request, signal) {
    const { query = "", like = null, liked = [], disliked = [], where = {}, minConfidence = 0 } = request;
    const { page: number = 1, size = 60 } = request;
    const places = (ids) => (ids ?? []).map(Number);
    const one = like === null || like === undefined ? null : Number(like);
    const marks = { liked: places(liked), disliked: places(disliked) };
    if (!query.trim() && one === null && !marks.liked.length && !marks.disliked.length) {
      return backend.browse({ page: number, size, where }, signal);
    }
    const found = await ranking({ query, like: one, ...marks, where, minConfidence }, signal);
    const all = found.upTo(number * size + 1);
    return {
      matches: page(all, number, size),
      best: all.length ? null : found.best,
      searched: found.searched,
      vetoed: 0,
      more: all.length > number * size,
    };
  },

  async browse({ page: number = 1, size = 60, where = {} } = {}, signal) {
    const known = await photographs();
    signal?.throwIfAborted();
    const places = newest(known, passing(known, where));
    const matches = page(places, number, size).map((place) => ({
      ...photo(known, place),
      score: null,
      confidence: null,
      duplicates: 0,
    }));
    return { matches, best: null, searched: places.length, vetoed: 0, more: places.length > number * size };
  },
};
