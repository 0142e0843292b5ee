// Figures: specifications of Vega-Lite that come with the page, their data, and Vega that draws them. Nothing is computed here.
const FIGURES = new Set();
let theme = 'light';

// Vega empties the elements that it draws in; no other markup is ever made from text.
if (window.trustedTypes) window.trustedTypes.createPolicy('default', { createHTML: (text) => (text === '' ? text : null) });

// Nested numbers -> tidy rows, by the dimensions of their kind; `names` are the values of dimensions (sets, seeds).
function unfold(kind, values, names) {
  const rows = [];
  const go = (k, inner, known) => {
    if (k === D.over[kind].length) { rows.push({ ...known, ...inner }); return; }
    const [name, source] = D.over[kind][k];
    const size = Math.max(...Object.values(inner).filter(Array.isArray).map((v) => v.length));
    for (let i = 0; i < size; i += 1) {
      const own = source === 'phases' ? D.phases[i] : names[source] ? names[source][i] : i + (source === 'from 1' ? 1 : 0);
      const next = Object.fromEntries(Object.entries(inner).map(([key, v]) => [key, Array.isArray(v) ? v[i] : v]));
      go(k + 1, next, name ? { ...known, [name]: own } : known);
    }
  };
  go(0, values, {});
  return rows;
}
// Columns -> rows.
const rowsOf = (columns) => { const names = Object.keys(columns); return (columns[names[0]] || []).map((_, i) => Object.fromEntries(names.map((n) => [n, columns[n][i]]))); };
const labelled = (rows, text) => rows.map((row) => ({ label: text, ...row }));

// A specification with its words, data and sizes for a width in pixels.
function specification(kind, sets, words, width) {
  const fit = (_, v) => (typeof v === 'string' ? v.replace(/\{(unit|measure)\}/g, (__, name) => words[name] || '') : v);
  const spec = JSON.parse(JSON.stringify(D.pictures[kind]), fit);
  spec.datasets = sets;
  if (spec.hconcat && width < 620) { spec.vconcat = spec.hconcat; delete spec.hconcat; }
  const inner = (n) => Math.max(150, Math.floor((width - 76 * n) / n));
  for (const part of spec.vconcat || []) Object.assign(part, { width: inner(1), height: Math.round(1.5 * part.height) });
  for (const part of spec.hconcat || []) part.width = inner(spec.hconcat.length) - 10;
  if (spec.vconcat || spec.hconcat) return spec;
  spec.width = width;
  spec.autosize = { type: 'fit-x', contains: 'padding' };
  if (spec.height && spec.height.step) {
    const field = spec.layer[0].encoding.y.field;
    const size = new Set(sets.table.map((row) => row[field])).size;
    spec.height = Math.max(40, Math.min(900, size * spec.height.step * 1.4));
  } else if (spec.height < 300) spec.height = 260;
  return spec;
}

// What is under the pointer, as text.
function tip(_, event, __, value) {
  const node = byId('tip');
  if (value === null || value === undefined || value === '') { node.hidden = true; return; }
  const lines = typeof value === 'object' ? Object.entries(value).filter(([, v]) => v !== '' && v !== 'null') : [['', value]];
  node.replaceChildren(...lines.map(([key, v]) => el('div', {}, key ? el('span', { class: 'quiet' }, `${key} `) : null, el('bdi', {}, v))));
  node.hidden = false;
  const x = Math.min(event.clientX + 14, innerWidth - node.offsetWidth - 8);
  const y = event.clientY + 16 + node.offsetHeight > innerHeight ? event.clientY - node.offsetHeight - 10 : event.clientY + 16;
  node.style.left = `${Math.max(4, x)}px`;
  node.style.top = `${Math.max(4, y)}px`;
}
const options = (config) => ({ mode: 'vega-lite', renderer: 'svg', actions: false, ast: true, defaultStyle: false, logLevel: 1, tooltip: tip, config: { aria: false, ...config } });

// A figure on the page: caption, picture, its numbers as a table on demand, two downloads. `sets()` gives its data, or null.
function figure({ kind, title, note, name, sets, words = {}, wide, controls }) {
  const slot = el('div', { class: 'picture', role: 'img', 'aria-label': `${title}. ${note || ''} The numbers are in the table below.` });
  const body = el('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': `${title}: numbers` });
  const numbers = el('details', { class: 'numbers' }, el('summary', {}, 'Numbers'), body);
  const state = { slot, kind, sets, words, title, drawn: 0, view: null };
  numbers.addEventListener('toggle', () => { body.replaceChildren(); if (numbers.open) body.append(...numbersOf(tableOf(state.sets()), title)); });
  const save = el('div', { class: 'save' },
    el('button', { type: 'button', class: 'small', 'aria-label': `Download ${title} as SVG`, onclick: () => savedSvg(state).then((text) => download(`${name()}.svg`, 'image/svg+xml', text)) }, 'SVG'),
    el('button', { type: 'button', class: 'small', 'aria-label': `Download the numbers of ${title} as CSV`, onclick: () => download(`${name()}.csv`, 'text/csv', csvText(tableOf(state.sets()))) }, 'CSV'));
  const node = el('figure', { class: wide ? 'wide' : null },
    el('figcaption', {}, el('div', {}, el('h3', {}, title), note ? el('p', { class: 'quiet' }, note) : null), save), controls || null, slot, numbers);
  FIGURES.add(state);
  state.node = node;
  requestAnimationFrame(() => redraw(state));
  return { node, redraw: (other) => { state.kind = other || state.kind; numbers.open = false; redraw(state); } };
}
// The tidy rows as a table: a heading and lines; texts of links and places of names are no numbers.
function tableOf(sets) {
  const rows = sets ? sets.table : [];
  const names = [...new Set(rows.flatMap(Object.keys))].filter((n) => !['href', 'name', 'name_x', 'name_y'].includes(n));
  return [names, ...rows.map((row) => names.map((n) => (Array.isArray(row[n]) ? row[n].join(' ') : typeof row[n] === 'boolean' ? (row[n] ? 'yes' : 'no') : row[n] ?? null)))];
}
function numbersOf([head, ...lines], title) {
  const show = (v) => (typeof v === 'number' ? general(v) : v ?? NONE);
  const made = [el('table', { class: 'bare' }, el('caption', { class: 'unseen' }, title),
    el('thead', {}, el('tr', {}, head.map((word) => el('th', { scope: 'col' }, word)))),
    el('tbody', {}, lines.slice(0, 1000).map((line) => el('tr', {}, line.map((v, k) => (k ? el('td', { class: typeof v === 'number' ? 'num' : null }, show(v)) : el('th', { scope: 'row' }, show(v))))))))];
  if (lines.length > 1000) made.push(el('p', { class: 'quiet' }, `The first 1\u2009000 of ${whole(lines.length)} lines; the CSV has them all.`));
  return made;
}

function redraw(state) {
  const width = Math.round(state.slot.clientWidth);
  if (!state.node.isConnected || width < 10) return;
  state.drawn = width;
  const sets = state.sets();
  const turn = (state.turn || 0) + 1;
  state.turn = turn;
  if (!sets || !sets.table.length) { state.slot.replaceChildren(el('p', { class: 'quiet' }, 'Nothing here has these numbers.')); return; }
  const place = el('div');
  const drawnIn = theme;
  state.slot.append(place);
  vegaEmbed(place, specification(state.kind, sets, state.words, Math.max(250, width)), options(D.themes[theme])).then((made) => {
    if (state.turn !== turn) { made.finalize(); place.remove(); return; }
    if (state.view) state.view.finalize();
    state.view = made;
    state.slot.replaceChildren(place);
    state.slot.dataset.theme = drawnIn;
    state.node.dataset.drawn = 'yes';
  });
}
function redrawAll(force) {
  for (const state of FIGURES) {
    if (!state.node.isConnected) { FIGURES.delete(state); if (state.view) state.view.finalize(); } else if (force || Math.abs(Math.round(state.slot.clientWidth) - state.drawn) > 1) redraw(state);
  }
}
// The light theme on white at a fixed width.
async function savedSvg(state) {
  const made = await vegaEmbed(document.createElement('div'), specification(state.kind, state.sets(), state.words, 640), options({ ...D.themes.light, background: '#ffffff' }));
  const text = await made.view.toSVG();
  made.finalize();
  return `<?xml version="1.0" encoding="UTF-8"?>\n${text}\n`;
}
