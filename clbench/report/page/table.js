// The leaderboard: sorting by several columns, filters, a choice of columns, CSV.
const PAGE = 200;
const VERDICTS = { best: ['best', 'best'], 'not distinguishable': ['not distinguishable', 'same'], 'too few seeds': ['too few seeds', 'unknown'], 'no spread': ['no spread', 'unknown'], worse: ['worse', 'worse'] };
const COLUMNS = [
  { id: 'learner', name: 'Learner', of: (r) => r.learner.toLowerCase(), word: true, fixed: true },
  { id: 'last', name: 'Last accuracy', hint: 'last_macro_mean', of: (r) => r.mean, show: (r) => accuracyCell(r), down: true },
  { id: 'rank', name: 'Rank', hint: 'rank', of: (r) => (r.rank ? r.rank[0] + r.rank[1] / 1e6 : null), show: (r) => ranks(r) },
  { id: 'vs', name: 'Against best', hint: 'vs_best', of: (r) => ({ best: 0, 'not distinguishable': 1, 'too few seeds': 2, 'no spread': 2, worse: 3 }[r.vs] ?? null), show: (r) => verdictCell(r) },
  { id: 'worst', name: 'Worst order', hint: 'worst_order', of: (r) => (r.orders ? order('worst', r) : null), show: (r) => worstCell(r), down: true },
  { id: 'step', name: 'Average', hint: 'step_macro_mean', of: (r) => column('step_macro_mean', r.i), show: (r) => pair(r, 'step_macro'), down: true },
  { id: 'forgetting', name: 'Forgetting', hint: 'forgetting_mean', of: (r) => column('forgetting_mean', r.i), show: (r) => pair(r, 'forgetting') },
  { id: 'seeds', name: 'Seeds', hint: 'n_seeds', of: (r) => r.n, show: (r) => seedCell(r), down: true },
  { id: 'seconds', name: 'Time', hint: 'seconds_mean', of: (r) => r.seconds, show: (r) => paretoCell(r, duration(r.seconds), 'pareto_seconds', 'time') },
  { id: 'held', name: 'Bytes held', hint: 'stored_bytes', of: (r) => r.held, show: (r) => paretoCell(r, bytes(r.held), 'pareto_bytes', 'bytes') },
  { id: 'memory', name: 'Peak memory', hint: 'peak_memory_mb_mean', of: (r) => r.memory, show: (r) => (has(r.memory) ? bytes(r.memory * 1e6) : NONE) },
  { id: 'model', name: 'Model', of: (r) => r.model.toLowerCase(), word: true, show: (r) => el('bdi', { class: 'clip', title: r.model }, r.model) },
  { id: 'scenario', name: 'Scenario', of: (r) => r.scenario.toLowerCase(), word: true, show: (r) => el('bdi', { class: 'clip', title: r.scenario }, streamName(r.stream)) },
];
const LISTED = new Set(['rank', 'shared', 'orders', 'worst_order', 'order_mean', 'order_low', 'order_high', 'order_worst', 'order_worst_low', 'order_worst_high', 'last_macro_mean', 'step_macro_mean', 'forgetting_mean', 'n_seeds', 'seconds_mean', 'stored_bytes', 'peak_memory_mb_mean', 'last_macro_low', 'last_macro_high', 'last_macro_std', 'step_macro_std', 'forgetting_std', 'vs_best', 'vs_best_p', 'pareto_bytes', 'pareto_seconds', 'failed', 'dead', 'running']);
const COSTS = /^(seconds|peak|stored|exemplar|parameters|passes|visits|steps)/;
const EXTRA = Object.keys(D.columns).filter((name) => !LISTED.has(name) && !name.endsWith('_std')).map((name) => ({
  id: name, name: name.replace(/_mean$/, ''), hint: name, extra: true, of: (r) => column(name, r.i),
  show: (r) => { const v = column(name, r.i); return !has(v) ? NONE : name.includes('/') ? general(v) : name.startsWith('seconds') ? duration(v) : name.endsWith('bytes') ? bytes(v) : COSTS.test(name) ? amount(v) : /nll|brier/.test(name) ? fixed(v, 3) : per(v); },
}));
const view = { order: [{ id: 'last', down: true }], filters: { scenario: '', learner: '', model: '', text: '', references: false, marked: false }, group: true, limit: PAGE, columns: new Set(), chosen: new Set() };

function accuracyCell(row) {
  if (!has(row.mean)) return NONE;
  return el('span', { class: 'accuracy' }, el('b', {}, per(row.mean)), el('small', {}, has(row.low) ? intervalText(row) : 'no interval'));
}
// The lowest mean among the class orders that these settings ran on, with the interval of that order.
function worstCell(row) {
  if (!row.orders) return NONE;
  return el('span', { class: 'accuracy', title: `the worst of ${row.orders} class orders, manifest ${column('worst_order', row.i)}` }, el('b', {}, per(order('worst', row))), el('small', {}, has(order('worst_low', row)) ? range(order('worst_low', row), order('worst_high', row)) : `of ${row.orders}`));
}
function verdictCell(row) {
  if (row.reference) return el('span', { class: 'mark reference' }, 'reference');
  if (row.legacy) return el('span', { class: 'mark unknown' }, 'legacy');
  if (!row.vs) return NONE;
  const [word, kind] = VERDICTS[row.vs] || [row.vs, 'unknown'];
  return el('span', { class: `mark ${kind}`, title: `${row.vs}${has(row.p) ? `, p = ${pvalue(row.p)} (paired t-test, Holm)` : ''}` }, word);
}
function pair(row, name) {
  const std = column(`${name}_std`, row.i);
  return [per(column(`${name}_mean`, row.i)), has(std) ? el('small', { class: 'std' }, `\u00a0\u00b1\u00a0${per(std)}`) : null];
}
function seedCell(row) {
  const lost = ['failed', 'dead', 'running'].filter((k) => column(k, row.i)).map((k) => `${column(k, row.i)} ${k}`);
  return [String(row.n), lost.length ? el('small', { class: 'warn' }, ` +${lost.join(', ')}`) : null];
}
const paretoCell = (row, shown, name, what) => [shown, column(name, row.i) === true ? el('span', { class: 'front', title: `On the Pareto front: nothing on this stream is more accurate for less ${what}` }, '\u25c6', el('span', { class: 'unseen' }, ' on the Pareto front')) : null];

const shownColumns = () => [...COLUMNS.filter((c) => (c.id !== 'scenario' || !view.group) && (c.id !== 'worst' || ROWS.some((r) => r.orders))), ...EXTRA.filter((c) => view.columns.has(c.id))];
const matches = (row, f) => (!f.scenario || String(D.stream[row.i]) === f.scenario || row.scenario === f.scenario.slice(1)) && (!f.learner || row.learner === f.learner) && (!f.model || row.model === f.model)
  && !(f.references && row.reference) && !(f.marked && row.marked) && f.text.toLowerCase().split(/\s+/).every((word) => row.text.includes(word));
const filtered = () => ROWS.filter((row) => matches(row, view.filters));

// No value sorts last, whatever the direction; equal rows keep the order they had.
function sorted(rows) {
  const keys = view.order.map(({ id, down }) => ({ of: [...COLUMNS, ...EXTRA].find((c) => c.id === id).of, sign: down ? -1 : 1 }));
  const values = new Map(rows.map((row) => [row, keys.map((k) => k.of(row))]));
  const group = view.group;
  return [...rows].sort((a, b) => {
    if (group && D.stream[a.i] !== D.stream[b.i]) return D.stream[a.i] - D.stream[b.i];
    const [x, y] = [values.get(a), values.get(b)];
    for (let k = 0; k < keys.length; k += 1) {
      if (x[k] === y[k]) continue;
      if (x[k] === null || x[k] === undefined) return 1;
      if (y[k] === null || y[k] === undefined) return -1;
      return (x[k] < y[k] ? -1 : 1) * keys[k].sign;
    }
    return a.i - b.i;
  });
}

function sortBy(id, add) {
  const known = view.order.find((o) => o.id === id);
  const first = [...COLUMNS, ...EXTRA].find((c) => c.id === id).down || false;
  const next = { id, down: known ? !known.down : first };
  view.order = add ? [...view.order.filter((o) => o.id !== id), next] : [next];
  if (add && known) view.order = view.order.map((o) => (o.id === id ? next : o));
  drawTable();
  byId('table').querySelector(`button[data-column="${CSS.escape(id)}"]`)?.focus();
  const named_ = view.order.map((o) => `${[...COLUMNS, ...EXTRA].find((c) => c.id === o.id).name}, ${o.down ? 'highest first' : 'lowest first'}`);
  say(`Sorted by ${named_.join(', then ')}`);
}

function headCell(c) {
  const place = view.order.findIndex((o) => o.id === c.id);
  const order = view.order[place];
  const arrow = order ? (order.down ? '\u2193' : '\u2191') : '';
  const button = el('button', { type: 'button', 'data-column': c.id, title: `${c.hint && D.about[c.hint] ? `${D.about[c.hint]}. ` : ''}Click to sort; with Shift as a further key`, onclick: (event) => sortBy(c.id, event.shiftKey) }, c.name, el('span', { class: 'arrow', 'aria-hidden': 'true' }, arrow, view.order.length > 1 && place >= 0 ? el('sup', {}, place + 1) : null));
  return el('th', { scope: 'col', class: c.word ? null : 'num', 'aria-sort': order ? (order.down ? 'descending' : 'ascending') : null }, button);
}

// Lines are made once for a choice of columns, so that sorting only moves them.
const LINES = { key: '', made: new Map() };
function rowLine(row, columns) {
  const key = columns.map((c) => c.id).join(' ');
  if (LINES.key !== key) { LINES.key = key; LINES.made.clear(); }
  if (!LINES.made.has(row)) LINES.made.set(row, newLine(row, columns));
  const line = LINES.made.get(row);
  line.querySelector('input').checked = view.chosen.has(row.key);
  return line;
}
function newLine(row, columns) {
  const box = el('input', { type: 'checkbox', 'aria-label': `Compare ${row.learner} ${row.variant}`, onchange: (event) => choose(row, event.target.checked) });
  const name = el('th', { scope: 'row', class: 'name' }, el('div', {}, box, el('span', {}, link(row),
    row.differs ? el('small', { class: 'quiet clip', title: row.differs }, el('bdi', {}, row.differs)) : null,
    row.marks && !row.reference ? el('small', { class: 'warn' }, el('bdi', {}, row.marks)) : null)));
  return el('tr', { 'data-key': row.key, class: row.reference || row.legacy ? 'aside' : null }, name, columns.slice(1).map((c) => el('td', { class: c.word ? null : 'num' }, c.show(row))));
}

function drawTable() {
  const columns = shownColumns();
  const rows = sorted(filtered());
  const shown = rows.slice(0, view.limit);
  const bodies = [];
  let last = null;
  for (const row of shown) {
    const place = view.group ? D.stream[row.i] : 'all';
    if (place !== last) {
      const body = el('tbody', {});
      if (view.group) body.append(el('tr', { class: 'group' }, el('th', { scope: 'rowgroup', colspan: columns.length }, el('div', {}, el('bdi', {}, streamName(row.stream)), el('small', {}, about(row.stream))))));
      bodies.push(body);
      last = place;
    }
    bodies[bodies.length - 1].append(rowLine(row, columns));
  }
  byId('table').replaceChildren(el('caption', { class: 'unseen' }, 'Learners with accuracy, interval and cost; column headings sort.'), el('thead', {}, el('tr', {}, columns.map(headCell))), ...bodies);
  byId('board-count').textContent = rows.length === ROWS.length ? `${plural(rows.length, 'row')}, one for each learner, model and choice of settings on a stream.` : `${whole(rows.length)} of ${plural(ROWS.length, 'row')}.`;
  byId('board-more').replaceChildren();
  if (rows.length > shown.length) {
    const more = (n, words) => el('button', { type: 'button', onclick: () => { view.limit = n; drawTable(); } }, words);
    byId('board-more').append(`The first ${whole(shown.length)} rows are shown. `, more(view.limit + PAGE, `Show ${PAGE} more`), ' ', more(Infinity, `Show all ${whole(rows.length)}`));
  }
  if (!rows.length && ROWS.length) byId('board-more').append('No row meets these filters. ', el('button', { type: 'button', onclick: clearFilters }, 'Clear them'));
}

function clearFilters() {
  byId('filters').reset();
  readFilters();
}
function readFilters() {
  const form = byId('filters');
  const value = (name) => form.elements[name].value;
  view.filters = { scenario: value('scenario'), learner: value('learner'), model: value('model'), text: value('text').trim(), references: form.elements.references.checked, marked: form.elements.marked.checked };
  view.limit = PAGE;
  drawTable();
}
function tableCsv() {
  const names = Object.keys(D.columns);
  const head = ['scenario', 'learner', 'model', 'variant', 'manifest', 'marks', 'seeds', ...names, 'command'];
  return csvText([head, ...sorted(filtered()).map((r) => [r.scenario, r.learner, r.model, r.variant, r.manifest, r.marks, r.seeds, ...names.map((n) => { const v = column(n, r.i); return typeof v === 'boolean' ? (v ? 'yes' : 'no') : Array.isArray(v) ? v.join('-') : v; }), D.commands[r.i]])]);
}

function board() {
  const unique = (of) => [...new Set(ROWS.map(of))].sort((a, b) => a.localeCompare(b));
  const options = (values) => [el('option', { value: '' }, 'all'), ...values.map(([value, words]) => el('option', { value }, briefly(words, 50)))];
  const field = (name, words, control) => el('label', { class: 'field' }, el('span', {}, words), control);
  const twins = unique((r) => r.scenario).filter((name) => D.streams.filter((s) => s.scenario === name).length > 1);
  const streams = [...twins.map((name) => [`=${name}`, `${name} (all streams)`]), ...[...byStream.keys()].sort((a, b) => a - b).map((place) => [String(place), streamName(D.streams[place])])];
  const check = (name, words) => el('label', { class: 'check' }, el('input', { type: 'checkbox', name }), ` ${words}`);
  byId('filters').append(
    field('scenario', 'Scenario', el('select', { name: 'scenario' }, options(streams))),
    field('learner', 'Learner', el('select', { name: 'learner' }, options(unique((r) => r.learner).map((v) => [v, v])))),
    field('model', 'Model', el('select', { name: 'model' }, options(unique((r) => r.model).map((v) => [v, v])))),
    field('text', 'Find', el('input', { name: 'text', type: 'search', placeholder: 'name, setting, variant', autocomplete: 'off', spellcheck: 'false' })),
    el('div', { class: 'checks' }, check('references', 'Hide references'), check('marked', 'Hide all marked')));
  byId('filters').addEventListener('submit', (event) => event.preventDefault());
  byId('filters').addEventListener('input', readFilters);
  const toggle = el('input', { type: 'checkbox', checked: true, onchange: () => { view.group = toggle.checked; drawTable(); } });
  const extras = el('div', { class: 'menu' }, EXTRA.map((c) => el('label', { title: D.about[c.hint] }, el('input', { type: 'checkbox', onchange: (e) => { if (e.target.checked) view.columns.add(c.id); else view.columns.delete(c.id); drawTable(); } }), ` ${c.name}`)));
  byId('board-tools').append(el('label', { class: 'check' }, toggle, ' Group by stream'),
    EXTRA.length ? el('details', { class: 'choose' }, el('summary', {}, 'More columns'), extras) : null,
    el('button', { type: 'button', class: 'small', onclick: () => download('leaderboard.csv', 'text/csv', tableCsv()) }, 'CSV'));
  byId('legend').append(...[...COLUMNS, ...EXTRA].filter((c) => c.hint && D.about[c.hint]).flatMap((c) => [el('dt', {}, c.name, ' ', el('code', {}, c.hint)), el('dd', {}, D.about[c.hint])]));
  drawTable();
}
