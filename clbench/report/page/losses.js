// Pre-training: a table for each stream, and everything about one row. Losses are nats per token, of images squared errors: lower is better.
const PRE = D.losses.rows.map((row, i) => ({ ...row, i, stream: D.losses.streams[row.stream], place: row.stream, n: row.runs.length, of: (name) => (row.numbers[name] || [null])[0], std: (name) => (row.numbers[name] || [null, null])[1] }));
const PREKEYS = new Map(PRE.map((row) => [row.key, row]));
const nats = (v, digits = 4) => fixed(v, digits);
const trained = (row) => ['trunk_new', 'trunk_replay', 'branch_new', 'branch_replay'].reduce((sum, k) => sum + (row.ledger[k] || 0), 0);
const preName = (stream) => stream.scenario + (D.losses.streams.filter((s) => s.scenario === stream.scenario).length > 1 ? ` \u00b7 ${stream.manifest}` : '');
const preLink = (row, text) => el('a', { href: `#loss=${encodeURIComponent(row.key)}` }, el('bdi', {}, text || row.label));
const PRECOLUMNS = [
  { name: 'Learner', of: (r) => r.learner.toLowerCase(), word: true, show: (r) => preLink(r, briefly(r.learner, 32)) },
  { name: 'Replay', of: (r) => r.replay, show: (r) => (has(r.replay) ? `${general(100 * r.replay)}\u2009%` : NONE) },
  { name: 'Final loss', hint: 'final_loss', of: (r) => r.of('final_loss'), show: (r) => [el('b', {}, nats(r.of('final_loss'))), has(r.low) ? el('small', { class: 'std' }, ` ${nats(r.low, 3)}\u2013${nats(r.high, 3)}`) : null] },
  { name: 'Against best', of: (r) => ({ best: 0, 'not distinguishable': 1, 'too few seeds': 2, 'no spread': 2, worse: 3 }[r.vs] ?? null), show: (r) => verdictCell(r) },
  ...[['Old sets', 'retained_loss'], ['Newest set', 'newest_loss'], ['Forgetting', 'forgetting_after'], ['Regret', 'regret'], ['Gap depth', 'gap_depth'], ['Recovery', 'recovery_ratio'], ['Anneal gain', 'anneal_gain_new'], ['Bits per byte', 'final_bpb']].map(([name, key]) => ({ name, hint: key, of: (r) => r.of(key), show: (r) => [nats(r.of(key), 3), has(r.std(key)) ? el('small', { class: 'std' }, `\u00a0\u00b1\u00a0${nats(r.std(key), 3)}`) : null] })),
  { name: 'Tokens', of: (r) => trained(r), show: (r) => amount(trained(r)) },
  { name: 'Time', of: (r) => r.seconds, show: (r) => duration(r.seconds) },
  { name: 'Seeds', of: (r) => r.n, show: (r) => [String(r.n), Object.keys(r.lost).length ? el('small', { class: 'warn' }, ` +${Object.entries(r.lost).map(([k, v]) => `${v} ${k}`).join(', ')}`) : null] },
  { name: 'Model', of: (r) => r.model.toLowerCase(), word: true, show: (r) => el('bdi', { class: 'clip', title: r.model }, r.model) },
];

function preBoard() {
  if (!PRE.length) return;
  byId('pre').hidden = false;
  byId('pre-nav').hidden = false;
  if (!ROWS.length) for (const id of ['board', 'cost']) byId(id).hidden = true;
  D.losses.streams.forEach((stream, place) => {
    const rows = PRE.filter((r) => r.place === place);
    const top = rows.find((r) => r.vs === 'best');
    const same = rows.filter((r) => r.vs === 'not distinguishable');
    const unknown = rows.filter((r) => r.vs === 'too few seeds' || r.vs === 'no spread');
    const floor = stream.floors.every(has) ? ` Floor (exact entropy): ${nats(stream.floor)}.` : '';
    byId('pre-streams').append(
      el('article', {},
        el('div', { class: 'headline' }, el('h3', {}, el('bdi', {}, briefly(preName(stream), 60))), el('button', { type: 'button', class: 'small', onclick: () => download(`${fileName('losses', stream.scenario)}.csv`, 'text/csv', preCsv(rows)) }, 'CSV')),
        el('p', { class: 'quiet' }, `${plural(stream.sets.length, 'set')}, ${whole(stream.n.reduce((a, b) => a + b, 0))} ${stream.unit} evaluated before and after each experience.${floor}`),
        top ? el('p', {}, 'Lowest final loss: ', preLink(top), ` ${nats(top.of('final_loss'))}.`, same.length ? [' Not distinguishable from it on shared seeds: ', same.slice(0, 6).flatMap((r, k) => [k ? ', ' : '', preLink(r)]), same.length > 6 ? ` and ${same.length - 6} more` : '', '.'] : null, unknown.length ? ` Too few shared seeds, or no spread over them, to tell: ${plural(unknown.length, 'row')}.` : null) : null,
        sortedTable(rows, PRECOLUMNS, 'Final loss', false, `Losses on ${stream.scenario}`),
        el('div', { class: 'figures' }, tradeFigures(stream))));
  });
}

// A table that sorts by any of its columns; no value sorts last.
function sortedTable(rows, columns, by, down, title) {
  const shown = columns.filter((c) => rows.some((r) => { const v = c.of(r); return v !== null && v !== undefined; }));
  const state = { by: shown.findIndex((c) => c.name === by), down };
  const body = el('tbody');
  const about = { ...D.losses.about, ...D.edits.about };
  const heads = shown.map((c, k) => el('th', { scope: 'col', class: c.word ? null : 'num' }, el('button', { type: 'button', title: c.hint ? about[c.hint] : 'Click to sort', onclick: () => { state.down = state.by === k ? !state.down : false; state.by = k; draw(); } }, c.name)));
  const draw = () => {
    heads.forEach((head, k) => head.setAttribute('aria-sort', k !== state.by ? 'none' : state.down ? 'descending' : 'ascending'));
    const value = shown[state.by].of;
    const order = [...rows].sort((a, b) => { const [x, y] = [value(a), value(b)]; if (x === y) return a.i - b.i; if (x === null || x === undefined) return 1; if (y === null || y === undefined) return -1; return (x < y ? -1 : 1) * (state.down ? -1 : 1); });
    body.replaceChildren(...order.map((r) => el('tr', { 'data-key': r.key }, shown.map((c, k) => el(k ? 'td' : 'th', { scope: k ? null : 'row', class: c.word ? null : 'num' }, c.show(r))))));
  };
  draw();
  return el('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': title }, el('table', { class: 'bare losses' }, el('caption', { class: 'unseen' }, title), el('thead', {}, el('tr', {}, heads)), body));
}
function preCsv(rows) {
  const names = Object.keys(D.losses.about).filter((name) => rows.some((r) => has(r.of(name))));
  const head = ['scenario', 'learner', 'replay', 'model', 'variant', 'marks', 'n_seeds', 'vs_best', 'vs_best_p', 'final_loss_low', 'final_loss_high', ...names.flatMap((n) => [`${n}_mean`, `${n}_std`]), 'command'];
  return csvText([head, ...rows.map((r) => [r.stream.scenario, r.learner, r.replay, r.model, r.variant, r.marks, r.n, r.vs, r.p, r.low, r.high, ...names.flatMap((n) => [r.of(n), r.std(n)]), r.command])]);
}

// What is kept against what is learned, and what shares of replay do.
function tradeFigures(stream) {
  const one = (kind, title, note) => stream.shown[kind] && figure({ kind, title, note, wide: true, words: stream, name: () => fileName(kind, stream.scenario), sets: () => ({ table: rowsOf(stream.shown[kind]) }) }).node;
  return [one('trade', 'Old sets against the newest', `Final loss on both, ${stream.measure}: lower left is better. Squares: references. A line joins the replay shares of a learner.`),
    one('replay', 'Shares of replay', 'Final loss on old sets and on the newest one: mean and 95 % bootstrap interval over seeds.')];
}

// --- one row -------------------------------------------------------------------------------------------------------
function showLoss(row) {
  const d = D.losses.details[row.i];
  const pm = (name) => (has(row.std(name)) ? `\u00b1 ${nats(row.std(name))} over seeds` : '');
  const number = (name, title) => fact(title, nats(row.of(name)), pm(name));
  byId('row').replaceChildren(
    el('p', { class: 'back' }, el('a', { href: '#pre' }, '\u2190 All rows')),
    el('div', { class: 'headline' }, el('h1', {}, el('bdi', {}, briefly(row.label, 90)))),
    el('p', { class: 'chips' }, [['scenario', row.stream.scenario], ['model', row.model], ['variant', row.variant], ['manifest', row.stream.manifest], ['marks', row.marks]].filter(([, v]) => v).map(([k, v]) => el('span', {}, el('small', {}, k), ' ', el('bdi', {}, v)))),
    el('dl', { class: 'factsheet' }, fact('Final loss', nats(row.of('final_loss')), has(row.low) ? `95 % interval ${nats(row.low)}\u2013${nats(row.high)}` : 'no interval from one seed'),
      number('retained_loss', 'On old sets'), number('newest_loss', 'On the newest set'), number('forgetting_after', 'Forgetting'), number('regret', 'Regret'), number('gap_depth', 'Stability gap'), number('anneal_gain_new', 'Anneal gain'), number('final_bpb', 'Bits per byte'), fact('Trained on', amount(trained(row)), `${row.stream.unit}, trunk and branch`), fact('Time', duration(row.seconds), `mean of ${plural(row.n, 'run')}`)),
    el('section', {}, el('h2', {}, 'Run it'), commandBox(row.command)),
    el('div', { class: 'figures' }, lossFigures(row, d || {}), d && d.all ? null : el('p', { class: 'notice' }, 'To keep this page small, single seeds of this row were left out; the records hold them.')),
    el('div', { class: 'columns' }, lossRuns(row), lossNumbers(row)));
}

// Loss over what was trained on with the rate, before and after each experience, and the rise after each boundary.
function lossFigures(row, d) {
  const { sets, unit, measure } = row.stream;
  const one = (kind, title, note, made) => d[kind] && figure({ kind, title, note, wide: kind === 'losses', words: row.stream, name: () => fileName(row.stream.scenario, row.label, kind), sets: made }).node;
  const seeds = d.losses ? d.losses[0].loss.map((_, k) => k) : [];
  const floors = (d.losses ? d.losses[2] : []).map((floor, j) => ({ set: sets[j], floor })).filter((f) => has(f.floor));
  const from = d.gaps ? d.gaps[3].start : 0;
  return [
    one('losses', `Loss over ${unit}, learning rate`, `On the first sequences of each set${seeds.length > 1 ? `, mean of ${plural(seeds.length, 'seed')}, shaded from the lowest to the highest` : ''}. Dotted: where an experience begins.${floors.length ? ' Dashed: the exact floor of the whole set; that of these few sequences lies near it.' : ''}`,
      () => ({ table: unfold('losses', d.losses[0], { sets, seeds }), edges: d.losses[1].map((x) => ({ x })), floors })),
    one('loss_matrix', 'Loss before and after each experience', `Loss (${measure}) on each set, mean of ${plural(row.n, 'seed')}; light is low.`, () => ({ table: unfold('loss_matrix', d.loss_matrix[0], { sets }) })),
    one('gaps', 'Stability gap', 'Rise of the loss on old sets above that at the boundary, mean over sets and seeds; steps on a logarithmic axis.', () => ({ table: unfold('gaps', d.gaps[0], {}).map((r) => ({ ...r, experience: r.experience + from })) })),
  ];
}

const lossRuns = (row) => runsTable(['Final', 'Old sets', 'Newest', 'Forgetting', 'Gap', 'Time'], row.runs.map(([seed, id, ...values]) => [seed, id, ...values.slice(0, -1).map((v) => nats(v)), duration(values[values.length - 1])]));
function lossNumbers(row) {
  const lines = Object.entries(D.losses.about).filter(([name]) => has(row.of(name))).map(([name, formula]) => [name, nats(row.of(name)), nats(row.std(name)), formula]);
  const words = { flops: 'floating-point operations', replay_bytes: 'bytes of old text held' };
  const ledger = Object.entries(row.ledger).filter(([, v]) => has(v)).map(([name, v]) => [name, amount(v), null, words[name] || 'tokens, largest over the runs']);
  return formulasTable('Every number', 'Every number of this row, mean and standard deviation over seeds, and its ledger', [...lines, ...ledger]);
}
