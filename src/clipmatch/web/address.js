// What is asked <-> the part of the address after "#", so that the back button, bookmarks and a reload know it.
// After "#" because it never leaves the browser, and works in a page that is opened from a file.

const TEXTS = { query: "q", view: "view" };
const WHERE = { after: "after", before: "before", camera: "camera", minSide: "side", minSize: "bytes", folder: "folder" };
const NUMBERS = new Set(["minSide", "minSize"]);

/** Nothing asked: all photographs. */
export function emptyQuestion() {
  return { query: "", view: "", like: null, image: null, liked: [], disliked: [], exclude: [], where: {}, minConfidence: 0, hybrid: false, photo: null };
}

/** A question -> the address's part; "" for the empty one. */
export function toAddress(asked) {
  const found = new URLSearchParams();
  const put = (name, value) => { if (value) found.append(name, value); };
  for (const [key, name] of Object.entries(TEXTS)) put(name, asked[key]);
  put("like", asked.like === null ? "" : String(asked.like));
  put("image", asked.image);
  put("yes", asked.liked.join("."));
  put("no", asked.disliked.join("."));
  for (const text of asked.exclude) put("not", text);
  for (const [key, name] of Object.entries(WHERE)) put(name, asked.where[key] ? String(asked.where[key]) : "");
  put("caption", asked.where.hasCaption ? "1" : "");
  put("min", asked.minConfidence ? String(asked.minConfidence) : "");
  put("words", asked.hybrid ? "1" : "");
  put("photo", asked.photo === null ? "" : String(asked.photo));
  return found.toString();
}

/** The address's part -> a question; what makes no sense is left out. */
export function fromAddress(text) {
  const found = new URLSearchParams(text.replace(/^#/, ""));
  const asked = emptyQuestion();
  const number = (name) => (/^\d+$/.test(found.get(name) ?? "") ? Number(found.get(name)) : null);
  const numbers = (name) => (found.get(name) ?? "").split(".").filter((part) => /^\d+$/.test(part)).map(Number);
  for (const [key, name] of Object.entries(TEXTS)) asked[key] = found.get(name) ?? "";
  asked.like = number("like");
  asked.image = found.get("image");
  asked.liked = numbers("yes");
  asked.disliked = numbers("no");
  asked.exclude = found.getAll("not");
  for (const [key, name] of Object.entries(WHERE)) {
    const value = NUMBERS.has(key) ? number(name) : found.get(name);
    if (value) asked.where[key] = value;
  }
  if (found.get("caption")) asked.where.hasCaption = true;
  asked.minConfidence = Math.min(Math.max(Number(found.get("min")) || 0, 0), 1);
  asked.hybrid = found.has("words");
  asked.photo = number("photo");
  return asked;
}

/** Whether anything is asked for, filters aside. */
export const isSearch = (asked) => Boolean(asked.query.trim() || asked.like !== null || asked.image || asked.liked.length); // crosses alone say nothing

/** Whether confidences are known for it: sentences alone have them. */
export const isSentence = (asked) => Boolean(asked.query.trim()) && !/(^|\s)@\w/.test(asked.query) && asked.like === null && !asked.image && !asked.liked.length && !asked.disliked.length;

/** How many filters are in use. */
export const filterCount = (asked) => Object.keys(asked.where).length + asked.exclude.length + (asked.minConfidence ? 1 : 0) + (asked.hybrid ? 1 : 0);
