// Rows of photographs that end flush, each in its own proportions. Sizes are known beforehand, so nothing jumps.

const NARROW = 0.45; // photographs that are narrower or wider than this are cropped in the grid
const WIDE = 3.2;

export const HEADING = 52; // pixels

/** Width : height in the grid. */
export function aspectOf(photo) {
  return Math.min(Math.max(photo.width / photo.height || 1, NARROW), WIDE);
}

/**
 * Photographs -> rows with their tops and heights, and the height of it all.
 *
 * wanted: the height of a row that has just the right photographs; each row is stretched or squeezed until it is full.
 * headingOf: the heading that a photograph stands under, or null; a new one begins a new row.
 */
export function justify(photos, width, wanted, gap, headingOf = () => null) {
  const rows = [];
  let top = 0;
  let from = 0;
  let sum = 0; // of the aspects in the row
  let heading = null;

  const close = (to, height) => {
    const widths = [];
    for (let at = from; at < to; at++) widths.push(aspectOf(photos[at]) * height);
    rows.push({ top, height, from, to, widths });
    top += height + gap;
    from = to;
    sum = 0;
  };
  const full = (number, aspects) => (width - gap * (number - 1)) / aspects; // the height at which it ends flush

  photos.forEach((photo, at) => {
    const under = headingOf(photo, at);
    if (under !== heading) {
      if (at > from) close(at, Math.min(wanted, full(at - from, sum)));
      heading = under;
      if (under !== null) {
        rows.push({ top, height: HEADING, heading: under, from: at, to: at });
        top += HEADING;
      }
    }
    const aspect = aspectOf(photo);
    const without = at > from ? full(at - from, sum) : Infinity;
    const within = full(at - from + 1, sum + aspect);
    if (within > wanted) {
      sum += aspect;
    } else if (without - wanted < wanted - within) {
      close(at, without);
      sum = aspect;
      if (full(1, aspect) <= wanted) close(at + 1, full(1, aspect));
    } else {
      close(at + 1, within);
    }
  });
  if (photos.length > from) close(photos.length, Math.min(wanted, full(photos.length - from, sum)));
  return { rows, height: Math.max(top - gap, 0) };
}

/** The place of the first row that ends below `y`. */
export function firstBelow(rows, y) {
  let low = 0;
  let high = rows.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (rows[middle].top + rows[middle].height > y) high = middle;
    else low = middle + 1;
  }
  return low;
}
