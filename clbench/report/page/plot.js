// Drawing: figures are functions (palette, width) -> <svg> with every colour written out, so that a saved file looks as it did.
const FONT = 'ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';
const FIGURES = new Set();

const canvas = (width, height, p) => svg('svg', { xmlns: 'http://www.w3.org/2000/svg', viewBox: `0 0 ${width} ${height}`, width, height, 'font-family': FONT, 'font-size': 12, fill: p.ink });
const label_ = (x, y, text, more = {}) => svg('text', { x: round(x), y: round(y), ...more }, text);
const round = (v) => Math.round(v * 100) / 100;
const titled = (node, text) => { node.append(svg('title', {}, text)); return node; };

// A figure on the page: caption, picture, its numbers as a table on demand, two downloads.
function figure({ title, note, name, draw, table, wide, controls }) {
  const slot = el('div', { class: 'picture' });
  const body = el('div', { class: 'scroll' });
  const numbers = el('details', { class: 'numbers' }, el('summary', {}, 'Numbers'), body);
  const state = { slot, draw, title, drawn: 0 };
  numbers.addEventListener('toggle', () => {
    body.replaceChildren();
    if (!numbers.open) return;
    const [head, ...lines] = table();
    body.tabIndex = 0;
    body.setAttribute('role', 'region');
    body.setAttribute('aria-label', `${title}: numbers`);
    body.append(el('table', { class: 'bare' }, el('caption', { class: 'unseen' }, title),
      el('thead', {}, el('tr', {}, head.map((word) => el('th', { scope: 'col' }, word)))),
      el('tbody', {}, lines.slice(0, 1000).map((line) => el('tr', {}, line.map((v, k) => (k ? el('td', { class: typeof v === 'number' ? 'num' : null }, typeof v === 'number' ? general(v) : v ?? NONE) : el('th', { scope: 'row' }, typeof v === 'number' ? general(v) : v ?? NONE)))))),
    ));
    if (lines.length > 1000) body.append(el('p', { class: 'quiet' }, `The first 1\u2009000 of ${whole(lines.length)} lines; the CSV has them all.`));
  });
  const save = el('div', { class: 'save' },
    el('button', { type: 'button', class: 'small', 'aria-label': `Download ${title} as SVG`, onclick: () => download(`${name()}.svg`, 'image/svg+xml', savedSvg(state)) }, 'SVG'),
    el('button', { type: 'button', class: 'small', 'aria-label': `Download the numbers of ${title} as CSV`, onclick: () => download(`${name()}.csv`, 'text/csv', csvText(table())) }, 'CSV'));
  const node = el('figure', { class: wide ? 'wide' : null },
    el('figcaption', {}, el('div', {}, el('h3', {}, title), note ? el('p', { class: 'quiet' }, note) : null), save), controls || null, slot, numbers);
  FIGURES.add(state);
  state.node = node;
  requestAnimationFrame(() => redraw(state));
  return { node, redraw: () => { redraw(state); if (numbers.open) { numbers.open = false; } } };
}
function redraw(state) {
  const width = Math.round(state.slot.clientWidth);
  if (!state.node.isConnected || width < 10) return;
  const picture = state.draw(palette(), Math.max(260, width));
  picture.setAttribute('role', 'group');
  picture.setAttribute('aria-label', `${state.title}. ${state.words || ''} The numbers are in the table below.`);
  state.slot.replaceChildren(picture);
  state.drawn = width;
}
function redrawAll(force) {
  for (const state of FIGURES) {
    if (!state.node.isConnected) FIGURES.delete(state);
    else if (force || Math.abs(Math.round(state.slot.clientWidth) - state.drawn) > 1) redraw(state);
  }
}
// The light palette on white at a fixed width: what goes into a paper.
function savedSvg(state) {
  const p = PALETTES.light;
  const picture = state.draw(p, 640);
  for (const anchor of picture.querySelectorAll('a')) anchor.replaceWith(...anchor.childNodes);
  picture.prepend(svg('title', {}, state.title), svg('rect', { width: '100%', height: '100%', fill: p.ground }));
  return `<?xml version="1.0" encoding="UTF-8"?>\n${new XMLSerializer().serializeToString(picture)}\n`;
}

// --- axes ----------------------------------------------------------------------------------------------------------
function ticks(low, high, most) {
  const span = high - low || Math.abs(high) || 1;
  const raw = span / Math.max(1, most);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((k) => k * power).find((s) => s >= raw * 0.999) || 10 * power;
  const made = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) made.push(Number((k * step).toPrecision(12)));
  return made;
}
function logTicks(low, high) {
  const made = [];
  const wide = high / low > 300;
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e += 1) {
    for (const k of wide ? [1] : [1, 2, 5]) { const v = k * 10 ** e; if (v >= low * 0.999 && v <= high * 1.001) made.push(v); }
  }
  return made.length > 1 ? made : [low, high];
}
// x, y: { low, high, log, ticks, show, name }. Grid lines lie behind; -> functions from values to places.
function axes(picture, p, box, x, y) {
  const place = (axis, start, stop) => (v) => {
    const [a, b, c] = axis.log ? [Math.log(v), Math.log(axis.low), Math.log(axis.high)] : [v, axis.low, axis.high];
    return round(start + ((a - b) / (c - b || 1)) * (stop - start));
  };
  const px = place(x, box.left, box.right);
  const py = place(y, box.bottom, box.top);
  const grid = svg('g', { stroke: p.grid, 'stroke-width': 1 });
  const words = svg('g', { fill: p.quiet, 'font-size': 11 });
  for (const v of y.ticks) {
    grid.append(svg('line', { x1: box.left, x2: box.right, y1: py(v), y2: py(v) }));
    words.append(label_(box.left - 7, py(v) + 4, y.show(v), { 'text-anchor': 'end' }));
  }
  let free = -Infinity;
  for (const v of x.ticks) {
    if (x.grid) grid.append(svg('line', { x1: px(v), x2: px(v), y1: box.top, y2: box.bottom }));
    const text = x.show(v);
    const half = 3.4 * text.length;
    if (px(v) - half < free || x.bare) continue;
    free = px(v) + half + 4;
    words.append(label_(px(v), box.bottom + 17, text, { 'text-anchor': 'middle' }));
  }
  picture.append(grid, svg('line', { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, stroke: p.line }), words);
  if (x.name && !x.bare) words.append(label_((box.left + box.right) / 2, box.bottom + 34, x.name, { 'text-anchor': 'middle' }));
  if (y.name) words.append(label_(box.left - 7, box.top - 9, y.name, { 'text-anchor': 'start', dx: -box.left + 9 }));
  return { px, py };
}
// Points (x, y) with gaps where y is null -> path data.
function path(points, px, py) {
  let text = '';
  let pen = false;
  for (const [x, y] of points) {
    if (!has(x) || !has(y)) { pen = false; continue; }
    text += `${pen ? 'L' : 'M'}${px(x)} ${py(y)}`;
    pen = true;
  }
  return text;
}
// Labels at the right end that do not lie on one another: [{ y, text, ink }] -> text elements.
function endLabels(labels, x, low, high, gap = 13) {
  const sorted = labels.filter((l) => has(l.y)).sort((a, b) => a.y - b.y);
  let floor = low;
  for (const l of sorted) { l.at = Math.max(l.y, floor); floor = l.at + gap; }
  let ceiling = high;
  for (const l of [...sorted].reverse()) { l.at = Math.min(l.at, ceiling); ceiling = l.at - gap; }
  return sorted.map((l) => label_(x, l.at + 4, l.text, { fill: l.ink, 'font-size': 11, 'font-weight': l.bold ? 650 : 400 }));
}
// An accuracy axis around values: 0 to 100 % where they spread widely, else a part of it.
function shareAxis(values, name) {
  const known = values.filter(has);
  const [least, most] = known.length ? [Math.min(...known), Math.max(...known)] : [0, 1];
  let low = most - least > 0.45 || least < 0.1 ? Math.min(0, least) : Math.max(0, Math.floor((least - 0.02) * 20) / 20);
  let high = most <= 1 ? Math.min(1, Math.ceil((most + 0.005) * 20) / 20) : most;
  if (high - low < 0.05) { low = Math.min(low, high - 0.05); high = Math.max(high, low + 0.05); }
  return { low, high, ticks: ticks(low, high, 5), show: (v) => `${Number((100 * v).toPrecision(4))}`.replace('-', MINUS), name };
}
// An axis of any other quantity.
function plainAxis(values, name, show = general) {
  const known = values.filter(has);
  const [least, most] = known.length ? [Math.min(...known), Math.max(...known)] : [0, 1];
  const pad = (most - least || Math.abs(most) || 1) * 0.05;
  const [low, high] = [least - pad, most + pad];
  return { low, high, ticks: ticks(low, high, 4), show, name };
}
