// The backend that asks `clipmatch serve`. A page without a server has another one under the same name, backend.js.

const SHORT = 640; // pixels of the shorter side that are sent of a picture; models look at fewer
const shrunk = new WeakMap(); // files that were sent already

async function send(method, path, { json, form, signal } = {}) {
  const headers = { "X-Clipmatch": "1" };
  if (json !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(`api/${path}`, { method, headers, body: form ?? (json === undefined ? undefined : JSON.stringify(json)), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer; is clipmatch serve still running?");
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  throw new Error(said.detail || `The server answers with status ${answer.status}.`);
}

async function call(method, path, what) {
  const answer = await send(method, path, what);
  return answer.status === 204 ? null : answer.json();
}

/** Paint: each line of the answer goes to onEvent, but for the last one, which is what has been painted. */
async function paint(json, onEvent, signal) {
  const { body } = await send("POST", "paint", { json, signal });
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let [text, last] = ["", null];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const lines = (text + value).split("\n");
    text = lines.pop();
    for (const line of lines) {
      last = JSON.parse(line);
      if (last.detail) throw new Error(last.detail);
      if (!last.nearest) onEvent(last);
    }
  }
  if (!last?.nearest) throw new Error("The server has ended the painting; its terminal says why.");
  return last;
}

function asWhere(where = {}) {
  const { after, before, camera, minSide, minSize, hasCaption, folder } = where;
  const given = { after, before, camera, min_side: minSide, min_size: minSize, has_caption: hasCaption, folder };
  return Object.fromEntries(Object.entries(given).filter(([, value]) => value));
}

/** A picture small enough to send; as it is, if the browser can't read it. */
async function shrink(file) {
  if (shrunk.has(file)) return shrunk.get(file);
  let made = file;
  try {
    const picture = await createImageBitmap(file);
    const scale = SHORT / Math.min(picture.width, picture.height);
    if (scale < 1) {
      const canvas = new OffscreenCanvas(Math.round(picture.width * scale), Math.round(picture.height * scale));
      const pen = canvas.getContext("2d");
      pen.imageSmoothingQuality = "high";
      pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
      made = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
    }
    picture.close();
  } catch { /* HEIC, RAW: the server reads them */ }
  shrunk.set(file, made);
  return made;
}

export const backend = {
  features: { refine: true, concepts: true, explain: true, filters: true, statistics: true, duplicates: true, exclude: true, image: true, hybrid: true },

  status: () => call("GET", "status"),

  async search({ query = "", image = null, like = null, liked = [], disliked = [], exclude = [], where = {}, minConfidence = 0, hybrid = false, page = 1, size = 60 }, signal) {
    const json = { query, like, liked, disliked, exclude, where: asWhere(where), min_confidence: minConfidence || null, hybrid, page, size };
    if (!image) return call("POST", "search", { json, signal });
    const form = new FormData();
    form.append("image", await shrink(image), image.name || "picture");
    form.append("question", JSON.stringify(json));
    return call("POST", "search-image", { form, signal });
  },

  browse: ({ page = 1, size = 60, where = {} } = {}, signal) => call("POST", "browse", { json: { page, size, where: asWhere(where) }, signal }),

  concepts: () => call("GET", "concepts"),
  teach: ({ name, liked, disliked = [] }) => call("POST", "concepts", { json: { name, liked, disliked } }),
  renameConcept: (old, name) => call("PATCH", `concepts/${encodeURIComponent(old)}`, { json: { name } }),
  forgetConcept: (name) => call("DELETE", `concepts/${encodeURIComponent(name)}`),

  explain: ({ id, query }, signal) => call("POST", "explain", { json: { id, query }, signal }),
  paint,
  duplicates: (signal) => call("GET", "duplicates", { signal }),
  statistics: (signal) => call("GET", "statistics", { signal }),
};
