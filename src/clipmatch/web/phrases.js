// Figures -> words: what people read instead of numbers, or beside them.

const DATE = new Intl.DateTimeFormat(undefined, { dateStyle: "long" });
const DATE_TIME = new Intl.DateTimeFormat(undefined, { dateStyle: "long", timeStyle: "short" });
const MONTH = new Intl.DateTimeFormat(undefined, { month: "long", year: "numeric" });
const COUNT = new Intl.NumberFormat();

export const count = (number) => COUNT.format(number);
export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;
export const percent = (share) => (share > 0 && share < 0.01 ? "under 1 %" : `${Math.round(100 * share)} %`);
export const dateOf = (text) => DATE.format(new Date(text));
export const dateTimeOf = (text) => DATE_TIME.format(new Date(text));
export const monthOf = (text) => MONTH.format(new Date(text));

/** Bytes, as 3.4 MB. */
export function fileSize(bytes) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let unit = 0;
  for (; bytes >= 1000 && unit < units.length - 1; unit++) bytes /= 1000;
  return `${unit && bytes < 10 ? bytes.toFixed(1) : Math.round(bytes)} ${units[unit]}`;
}

/** How sure a confidence is, in a word or two. */
export function sureness(confidence) {
  const steps = [[0.8, "Almost surely this one"], [0.5, "Probably this one"], [0.2, "Quite possibly this one"], [0.05, "Perhaps this one"]];
  return (steps.find(([least]) => confidence >= least) ?? [0, "Hardly this one"])[1];
}

/** What a confidence means, in full. */
export function surenessInFull(confidence) {
  return `${sureness(confidence)}: ${percent(confidence)} is how probable it is that this very photograph is the one you describe. Where many would do, 10 % is much.`;
}

/** What a concept's leave-one-out precision means. */
export function precisionInFull(precision) {
  if (precision === null || precision === undefined) return "Too few examples to say how well it is known.";
  return `Precision ${percent(precision)}: when each example is judged by what the others teach, that share of the photographs that come first are examples.`;
}

/** What a photograph is called when it is read out. */
export function spokenName(photo, mark) {
  const parts = [photo.caption || photo.name];
  if (photo.taken) parts.push(dateOf(photo.taken));
  if (photo.confidence !== null && photo.confidence !== undefined) parts.push(`confidence ${percent(photo.confidence)}`);
  if (photo.duplicates) parts.push(plural(photo.duplicates, "near-duplicate"));
  if (mark) parts.push(mark === "liked" ? "ticked" : "crossed out");
  return parts.join(", ");
}
