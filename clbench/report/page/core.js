// Values, elements, formats. Nothing from a record is ever parsed as markup: it arrives as JSON and leaves as text nodes.
const D = JSON.parse(document.getElementById('data').textContent);
const byId = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? '' : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const say = (text) => { byId('said').textContent = text; };
const plural = (n, word, many) => `${whole(n)} ${n === 1 ? word : many || `${word}s`}`;
const whole = (n) => Math.round(n).toLocaleString('en-GB').replace(/,/g, '\u2009');

// --- numbers as people read them -----------------------------------------------------------------------------------
const NONE = '\u2013';
const MINUS = '\u2212';
const has = (v) => typeof v === 'number' && Number.isFinite(v);
const fixed = (v, digits) => (has(v) ? v.toFixed(digits).replace(/^-(?=0(\.0*)?$)/, '').replace('-', MINUS) : NONE);
const per = (v, digits = 1) => (has(v) ? fixed(100 * v, digits) : NONE);
const signed = (v, digits = 1) => (!has(v) ? NONE : (v > 0 && per(v, digits) !== (0).toFixed(digits) ? '+' : '') + per(v, digits));

function duration(s) {
  if (!has(s)) return NONE;
  if (s < 100) return `${s < 9.95 ? s.toFixed(1) : s.toFixed(0)}\u00a0s`;
  if (s < 5940) return `${(s / 60).toFixed(s < 594 ? 1 : 0)}\u00a0min`;
  return `${(s / 3600).toFixed(s < 35640 ? 1 : 0)}\u00a0h`;
}
function scaled(v, units, step) {
  let i = 0;
  while (i < units.length - 1 && Math.abs(v) >= 0.9995 * step) { v /= step; i += 1; }
  return `${Math.abs(v) < 9.995 && i ? v.toFixed(1) : v.toFixed(0)}${units[i] ? `\u00a0${units[i]}` : ''}`;
}
const bytes = (v) => (has(v) ? scaled(v, ['B', 'kB', 'MB', 'GB', 'TB'], 1000) : NONE);
const amount = (v) => (has(v) ? scaled(v, ['', 'k', 'M', 'G', 'T', 'P'], 1000) : NONE);
const general = (v) => (!has(v) ? NONE : Number.isInteger(v) && Math.abs(v) < 1e9 ? whole(v) : String(Number(v.toPrecision(4))).replace('-', MINUS));
const pvalue = (p) => (!has(p) ? NONE : p < 0.0001 ? '< 0.0001' : p.toFixed(p < 0.01 ? 4 : p < 0.1 ? 3 : 2));

// --- rows ----------------------------------------------------------------------------------------------------------
const column = (name, i) => { const values = D.columns[name]; const v = values ? values[i] : null; return v === undefined ? null : v; };
const ROWS = D.lines.map(([scenario, learner, model, variant, manifest, marks, seeds, reference, legacy, marked], i) => {
  const row = { i, key: D.keys[i], scenario, learner, model, variant, manifest, marks, seeds, reference, legacy, marked };
  row.stream = D.streams[D.stream[i]];
  row.differs = D.differs[i];
  row.mean = column('last_macro_mean', i);
  row.low = column('last_macro_low', i);
  row.high = column('last_macro_high', i);
  row.seconds = column('seconds_mean', i);
  row.memory = column('peak_memory_mb_mean', i);
  const stored = column('stored_bytes', i);
  row.held = has(stored) ? stored + (column('exemplar_bytes', i) || 0) : null;
  row.n = column('n_seeds', i) || 0;
  row.vs = column('vs_best', i);
  row.p = column('vs_best_p', i);
  row.rank = column('rank', i);
  row.shared = column('shared', i);
  row.orders = column('orders', i);
  row.runs = D.runs[i].map(([seed, id, last, step, forgetting, micro, seconds, memory]) => ({ seed, id, last, step, forgetting, micro, seconds, memory }));
  row.text = [scenario, learner, model, variant, manifest, marks, row.differs].join(' ').toLowerCase();
  return row;
});
const KEYS = new Map(ROWS.map((row) => [row.key, row]));
const TWICE = new Set();
{
  const seen = new Set();
  for (const row of ROWS) {
    const name = [D.stream[row.i], row.learner].join('\n');
    if (seen.has(name)) TWICE.add(name);
    seen.add(name);
  }
}
const several = (row) => TWICE.has([D.stream[row.i], row.learner].join('\n'));
const ranks = (row) => (row.rank ? [...new Set(row.rank)].join('\u2013') : NONE);
const label = (row) => row.learner + (several(row) ? ` (${row.differs || row.model})` : '');
const briefly = (text, most = 28) => (text.length <= most ? text : `${text.slice(0, most - 1)}\u2026`);
const about = (stream) => {
  const parts = [];
  if (stream.order) parts.push(plural(stream.order, 'class', 'classes'));
  const steps = 1 + Math.max(...stream.first, stream.classes.length - 1);
  parts.push(`${stream.order ? 'in ' : ''}${plural(steps, 'experience')}`);
  parts.push(`${whole(stream.n.reduce((a, b) => a + b, 0))} test samples`);
  const made = (stream.operators || []).length ? `; ${stream.operators.join(', ')}` : '';
  return parts.join(', ').replace(', in ', ' in ') + made;
};
const streamName = (stream) => {
  const twins = D.streams.filter((other) => other.scenario === stream.scenario).length > 1;
  return stream.scenario + (twins ? ` \u00b7 ${stream.manifest}` : '');
};
const link = (row, text) => el('a', { href: `#row=${encodeURIComponent(row.key)}` }, el('bdi', {}, text || row.learner));

// --- files made on the spot ----------------------------------------------------------------------------------------
function csvCell(value) {
  if (value === null || value === undefined) return '';
  if (typeof value === 'number') return has(value) ? String(value) : '';
  let text = String(value);
  if (/^[=+\-@\t\r]/.test(text)) text = `'${text}`;
  return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
}
const csvText = (lines) => lines.map((line) => line.map(csvCell).join(',')).join('\n') + '\n';

function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type: `${type};charset=utf-8` }));
  const anchor = el('a', { href: url, download: name });
  document.body.append(anchor);
  anchor.click();
  anchor.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
  say(`${name} downloaded`);
}
const fileName = (...words) => words.join('-').toLowerCase().replace(/[^a-z0-9._-]+/g, '_').replace(/^[._-]+|[._-]+$/g, '').slice(0, 80) || 'figure';

function copyButton(text, what) {
  const button = el('button', { type: 'button', class: 'small', 'aria-label': `Copy ${what}` }, 'Copy');
  button.addEventListener('click', () => {
    const done = (ok) => {
      button.textContent = ok ? 'Copied' : 'Press Ctrl+C';
      say(ok ? `${what} copied` : 'The text is selected: copy it with Ctrl+C');
      setTimeout(() => { button.textContent = 'Copy'; }, 1800);
    };
    const byHand = () => {
      const code = button.parentNode.querySelector('code');
      if (code) { const range = document.createRange(); range.selectNodeContents(code); const s = getSelection(); s.removeAllRanges(); s.addRange(range); }
      let ok = false;
      try { ok = document.execCommand('copy'); } catch { ok = false; }
      done(ok);
    };
    if (navigator.clipboard && navigator.clipboard.writeText) navigator.clipboard.writeText(text).then(() => done(true), byHand);
    else byHand();
  });
  return button;
}
function commandBox(text) {
  if (!text) return el('p', { class: 'quiet' }, 'The command would be too long or holds characters that are not shown: take the configuration from the record.');
  return el('div', { class: 'command' }, el('code', { tabindex: 0 }, text), copyButton(text, 'command'));
}

// A small table under a title; `kinds`: the class of each column, the last one of all that follow.
function bareTable(title, caption, head, lines, kinds, words) {
  const kind = (k) => kinds[Math.min(k, kinds.length - 1)];
  return el('section', {}, el('h2', {}, title), el('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': title }, el('table', { class: `bare${words ? ' words' : ''}` }, el('caption', { class: 'unseen' }, caption),
    el('thead', {}, el('tr', {}, head.map((word, k) => el('th', { scope: 'col', class: kind(k) === 'num' ? 'num' : null }, word)))),
    el('tbody', {}, lines.map(([name, ...cells]) => el('tr', {}, el('th', { scope: 'row' }, name), cells.map((v, k) => el('td', { class: kind(k + 1) }, v))))))));
}
const simpleTable = (title, head, lines, words) => bareTable(title, title, head, lines, [null, 'num'], words);
const runsTable = (names, runs) => bareTable('Runs', 'Runs of this row', ['Seed', 'Record', ...names], runs.map(([seed, id, ...values]) => [String(seed), D.links ? el('a', { href: `records/${id}.json` }, el('code', {}, id)) : el('code', {}, id), ...values]), [null, null, 'num']);
const formulasTable = (title, caption, lines) => bareTable(title, caption, ['Name', 'Mean', 'Std', 'Formula'], lines.map(([name, ...cells]) => [el('code', {}, name), ...cells]), [null, 'num', 'num', 'quiet']);
