// How well photographs match, computed in the page as clipmatch's Python does it (search.py, calibration.py,
// duplicates.py, teaching.py; the reasons are told there). In: rows of vectors. Out: numbers and orders. Knows nothing
// of files or of the page.
//
// Rows: {codes: Int8Array [n * d], scales: Float32Array [n], dim: d}; a row is its codes times its scale. A place is a
// row's number. Queries are unit vectors, Float32Array [d].

const STIFFNESS = 0.1; // how strongly the weights of a refined query are held near the query's own
const TRUST = 0.7; // spread, over the other photographs, of what the query adds up to
const LITTLE = 0.02; // spread of cosines in a collection of photographs that are all alike
const OTHERS = 1000; // photographs that stand for all of a collection
const COPY = 0.98; // cosine from which on another photograph is taken for a copy of an example
const STEPS = 60; // of Newton's method, each solved roughly

export function rowAt(rows, place) {
  const row = Float32Array.from(rows.codes.subarray(place * rows.dim, (place + 1) * rows.dim));
  return row.map((value) => value * rows.scales[place]);
}

export function unit(row) {
  const length = Math.max(Math.hypot(...row), 1e-9);
  return row.map((value) => value / length);
}

export function dot(left, right) {
  let sum = 0;
  for (let at = 0; at < left.length; at++) sum += left[at] * right[at];
  return sum;
}

/** The cosines of a query with the rows at some places, Float64Array [m]. */
export function cosines(rows, query, places) {
  const { codes, scales, dim } = rows;
  const found = new Float64Array(places.length);
  for (let index = 0; index < places.length; index++) {
    const start = places[index] * dim;
    let sum = 0;
    for (let at = 0; at < dim; at++) sum += codes[start + at] * query[at];
    found[index] = sum * scales[places[index]];
  }
  return found;
}

export function cosine(rows, one, other) {
  const { codes, scales, dim } = rows;
  let sum = 0;
  for (let at = 0; at < dim; at++) sum += codes[one * dim + at] * codes[other * dim + at];
  return sum * scales[one] * scales[other];
}

/** Terms {row, weight} -> one unit vector. */
export function sum(terms) {
  return unit(terms[0].row.map((_, at) => terms.reduce((whole, term) => whole + term.weight * term.row[at], 0)));
}

/** The scores of terms of different kinds: their cosines, standardised, for those of sentences are of another size. */
export function blend(rows, terms, places) {
  const whole = terms.reduce((found, term) => found + term.weight, 0);
  const scores = new Float64Array(places.length);
  for (const { row, weight } of terms) {
    const found = cosines(rows, row, places);
    const mean = meanOf(found);
    const spread = spreadOf(found);
    found.forEach((value, at) => { scores[at] += ((value - mean) / Math.max(spread, 1e-6)) * (weight / whole); });
  }
  return scores;
}

function meanOf(values) {
  return values.reduce((all, value) => all + value, 0) / values.length;
}

/** The standard deviation. */
function spreadOf(values) {
  const mean = meanOf(values);
  return Math.sqrt(values.reduce((all, value) => all + (value - mean) ** 2, 0) / values.length);
}

/** The probability of each photograph to be the one that is meant, Float64Array [m]: `Calibration.probabilities`.
 *
 *     e_i = w0 + w1 cosine_i + w2 background_i + w3 familiarity(query)
 *     P_i = exp(e_i) / (m + sum_j exp(e_j)), where photographs like i are left out of the sum
 *
 * familiarity: mean cosine of the query with the nearest few pictures of the calibration's bank.
 */
export function confidences(calibration, background, rows, query, places, scores) {
  const [constant, ofCosine, ofPicture, ofQuery] = calibration.weights;
  const bank = calibration.bank;
  const near = cosines(bank, query, Array.from(bank.scales.keys())).sort().subarray(-calibration.nearest);
  const known = constant + (ofQuery * near.reduce((all, value) => all + value, 0)) / near.length;
  const evidence = scores.map((score, index) => ofCosine * score + ofPicture * background[places[index]] + known);
  const top = evidence.reduce((most, value) => Math.max(most, value), 0); // so that no exponential overflows
  const odds = evidence.map((value) => Math.exp(value - top));
  const all = places.length * Math.exp(-top) + odds.reduce((all, value) => all + value, 0);
  const rivals = new Float64Array(places.length).fill(all);
  const likely = best(evidence, calibration.rivals);
  for (const one of likely) {
    for (const other of likely) {
      if (one !== other && cosine(rows, places[one], places[other]) >= calibration.alike) rivals[one] -= odds[other];
    }
  }
  return odds.map((value, index) => Math.min(value / rivals[index], 1)); // rounding
}

/** Where the highest values are, at most so many, in no order. */
function best(values, most) {
  const all = Array.from(values.keys());
  if (most >= values.length) return all;
  const least = Float64Array.from(values).sort()[values.length - most];
  return all.filter((index) => values[index] >= least).slice(0, most);
}

/** Indices from the highest value to the lowest; of equal ones, that with the higher score first. */
export function order(values, scores) {
  const indices = Uint32Array.from(values.keys());
  return indices.sort((one, other) => values[other] - values[one] || scores[other] - scores[one] || one - other);
}

/** Places in order -> stacks, each a place and its near-duplicates among those that follow; made as they are asked for.
 *
 * hashes: Uint32Array [2 n], 64 bits a photograph. near: {cosine, bits}.
 */
export function* stacks(ordered, rows, hashes, near) {
  const taken = new Uint8Array(ordered.length);
  for (let index = 0; index < ordered.length; index++) {
    if (taken[index]) continue;
    const stack = [ordered[index]];
    for (let next = index + 1; next < ordered.length; next++) {
      if (taken[next] || bitsApart(hashes, ordered[index], ordered[next]) > near.bits) continue;
      if (cosine(rows, ordered[index], ordered[next]) >= near.cosine) {
        taken[next] = 1;
        stack.push(ordered[next]);
      }
    }
    yield stack;
  }
}

function bitsApart(hashes, one, other) {
  return ones(hashes[2 * one] ^ hashes[2 * other]) + ones(hashes[2 * one + 1] ^ hashes[2 * other + 1]);
}

function ones(word) {
  word -= (word >>> 1) & 0x55555555;
  word = (word & 0x33333333) + ((word >>> 2) & 0x33333333);
  return Math.imul((word + (word >>> 4)) & 0x0f0f0f0f, 0x01010101) >>> 24;
}

// Ticks and crosses ---------------------------------------------------------------------------------------------------

/** A query after ticks and crosses: `teaching.learn`. liked, disliked: places. query: null for ticks alone. */
export function learn(rows, liked, disliked, query) {
  const marked = [...liked, ...disliked];
  const count = rows.scales.length;
  const step = Math.max(1, count / OTHERS);
  const drawn = [];
  for (let at = 0; at < count; at += step) drawn.push(Math.floor(at)); // evenly, so that it is the same each time
  const rest = drawn.filter((place) => !marked.some((other) => cosine(rows, place, other) >= COPY));
  const [good, bad, others] = [liked, disliked, rest].map((places) => places.map((place) => rowAt(rows, place)));
  const length = query ? TRUST / Math.max(others.length ? spreadOf(others.map((row) => dot(row, query))) : 0, LITTLE) : 0;
  const prior = Float64Array.from({ length: rows.dim }, (_, at) => (query ? length * query[at] : 0));
  let weights = fit(good, bad, others, prior);
  if (good.length) {
    const usual = median(good.map((row) => dot(weights, row)));
    const sure = others.filter((row) => dot(weights, row) <= usual);
    weights = fit(good, bad, sure, prior);
  }
  return unit(Float32Array.from(weights));
}

/** Weights [d] of a logistic regression with a constant that is held near a prior, by Newton's method.
 *
 * Each step is found by conjugate gradients, as exactly as the slope deserves (Dembo et al., 1982).
 */
function fit(good, bad, others, prior) {
  const inputs = [...good, ...bad, ...others];
  const dim = prior.length;
  const against = Math.max((bad.length > 0) + (others.length > 0), 1);
  const mark = (index) => (index < good.length ? 1 : -1);
  const shares = inputs.map((_, index) => {
    if (index < good.length) return 1 / good.length;
    return 1 / (index < good.length + bad.length ? bad.length : others.length) / against;
  });
  const start = Float64Array.from([...prior, 0]);
  const held = start.map((_, at) => (at < dim ? STIFFNESS : 1e-6)); // the constant is all but free
  const output = (weights, row) => dot(row, weights) + weights[dim];
  const outputs = (weights) => inputs.map((row) => output(weights, row));

  function loss(weights) {
    const given = outputs(weights);
    let sum = 0;
    for (let at = 0; at <= dim; at++) sum += (held[at] * (weights[at] - start[at]) ** 2) / 2;
    given.forEach((value, index) => {
      const margin = mark(index) * value;
      sum += shares[index] * (Math.log1p(Math.exp(-Math.abs(margin))) + Math.max(-margin, 0));
    });
    return sum;
  }

  function spread(factors, direction) {
    const found = held.map((value, at) => value * direction[at]);
    inputs.forEach((row, index) => {
      const factor = factors[index];
      for (let at = 0; at < dim; at++) found[at] += factor * row[at];
      found[dim] += factor;
    });
    return found;
  }

  let weights = start.slice();
  let now = loss(weights);
  for (let turn = 0; turn < STEPS; turn++) {
    const wrong = outputs(weights).map((value, index) => 1 / (1 + Math.exp(mark(index) * value)));
    const slope = spread(wrong.map((value, index) => -mark(index) * shares[index] * value),
      weights.map((value, at) => value - start[at]));
    const curved = wrong.map((value, index) => shares[index] * value * (1 - value));
    const curve = (direction) => spread(outputs(direction).map((value, index) => curved[index] * value), direction);
    const step = solve(curve, slope);
    let size = 1;
    let moved;
    let then;
    do {
      moved = weights.map((value, at) => value - size * step[at]);
      then = loss(moved);
      size /= 2;
    } while (then > now && size > 1e-3);
    if (!(now - then >= 1e-9)) break;
    weights = moved;
    now = then;
  }
  return weights.subarray(0, dim);
}

/** x with apply(x) = target, nearly; apply is symmetric and positive. */
function solve(apply, target) {
  const found = new Float64Array(target.length);
  const left = target.slice();
  const direction = target.slice();
  let size = dot(left, left);
  const enough = size * Math.min(0.01, size);
  for (let turn = 0; turn < target.length && size > enough; turn++) {
    const image = apply(direction);
    const step = size / dot(direction, image);
    for (let at = 0; at < found.length; at++) {
      found[at] += step * direction[at];
      left[at] -= step * image[at];
    }
    const next = dot(left, left);
    for (let at = 0; at < found.length; at++) direction[at] = left[at] + (next / size) * direction[at];
    size = next;
  }
  return found;
}

function median(values) {
  const sorted = Float64Array.from(values).sort();
  return (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
}
