// Two rows side by side: difference on shared seeds, verdict, curves over each other, costs, settings.
const versusHash = (a, b) => `#compare=${encodeURIComponent(a.key)}${b ? `,${encodeURIComponent(b.key)}` : ''}`;
const fullName = (row) => `${row.learner} \u00b7 ${streamName(row.stream)} \u00b7 ${row.model} \u00b7 ${row.variant}`;

function choose(row, on) {
  if (on) { view.chosen.add(row.key); while (view.chosen.size > 2) view.chosen.delete([...view.chosen][0]); } else view.chosen.delete(row.key);
  for (const box of byId('table').querySelectorAll('tbody input[type=checkbox]')) box.checked = view.chosen.has(box.closest('tr').dataset.key);
  tray();
}
function tray() {
  const rows = [...view.chosen].map((key) => KEYS.get(key));
  const node = byId('tray');
  node.hidden = !rows.length || byId('home').hidden;
  node.replaceChildren(...rows.map((row, k) => el('span', { class: `who ${'ab'[k]}` }, el('bdi', {}, briefly(label(row), 30)))),
    rows.length === 2 ? el('a', { class: 'button strong', href: versusHash(...rows) }, 'Compare') : el('span', { class: 'quiet' }, 'Choose one more'),
    el('button', { type: 'button', class: 'small', onclick: () => { view.chosen.clear(); drawTable(); tray(); } }, 'Clear'));
}

const PAIRS = new Map(D.pairs.map(([a, b, ...found]) => [`${a} ${b}`, found]));
// What clbench computed of two rows on shared seeds, as b - a: { n, mean, low, high, p, word }, or null.
function pairOf(a, b) {
  const found = PAIRS.get(`${a.i} ${b.i}`);
  if (found) { const [n, mean, low, high, p, word] = found; return { n, mean, low, high, p, word }; }
  const other = PAIRS.get(`${b.i} ${a.i}`);
  if (!other) return null;
  const [n, mean, low, high, p, word] = other;
  const minus = (v) => (has(v) ? -v : v);
  return { n, mean: minus(mean), low: minus(high), high: minus(low), p, word: { better: 'worse', worse: 'better' }[word] || word };
}
// The same in words: { pairs, test, kind, verdict }.
function judge(a, b) {
  const seeds = new Map(a.runs.map((r) => [r.seed, r]));
  const same = D.stream[a.i] === D.stream[b.i];
  const pairs = same ? b.runs.filter((r) => seeds.has(r.seed) && has(r.last) && has(seeds.get(r.seed).last)).map((r) => ({ seed: r.seed, a: seeds.get(r.seed).last, b: r.last })) : [];
  const test = pairOf(a, b);
  const out = { pairs, test, kind: 'unknown' };
  if (a === b) return { ...out, verdict: 'These are the same row.' };
  if (!same) return { ...out, verdict: 'Not comparable: the rows come from different streams (other samples, classes or order), so no difference is tested.' };
  if (a.legacy || b.legacy) return { ...out, test: null, verdict: 'No verdict: a legacy row holds numbers of other code.' };
  if (!pairs.length) return { ...out, verdict: 'Undecided: no seeds are shared, two are the least.' };
  if (!test) return { ...out, verdict: `This page holds no test of these two, to stay small: clbench report compare ${a.learner}@${a.variant} ${b.learner}@${b.variant}` };
  if (test.word === 'too few seeds') return { ...out, verdict: 'Undecided: one seed is shared, two are the least.' };
  if (test.word === 'no spread') return { ...out, verdict: 'Undecided: the difference is the same on every shared seed, and identical runs count once.' };
  if (test.word === 'not distinguishable') return { ...out, kind: 'same', verdict: test.mean === 0 && !has(test.low) ? 'Identical on all shared seeds.' : test.n < LEAST ? `Undecided: not distinguishable on ${plural(test.n, 'shared seed')}; ${LEAST} are the least to say more.` : `Cannot be told apart after ${plural(test.n, 'shared seed')}.` };
  const winner = test.word === 'better' ? b : a;
  const strict = adjusted(a, b);
  if (strict && strict.p >= 0.05) return { ...out, kind: 'same', verdict: `${winner === a ? 'A' : 'B'}, ${label(winner)}, is ahead by ${per(Math.abs(test.mean))} points, but not distinguishable when p is adjusted for all ${strict.tests} rows tested against the best.` };
  const note = a.reference || b.reference ? ' One of them is a reference that keeps all data.' : '';
  return { ...out, kind: 'better', verdict: `${winner === a ? 'A' : 'B'}, ${label(winner)}, is better by ${per(Math.abs(test.mean))} points of last accuracy.${note}` };
}

// What the leaderboard says of the same two, where one of them is its best: there p is adjusted for all rows compared.
function adjusted(a, b) {
  const other = a.vs === 'best' ? b : b.vs === 'best' ? a : null;
  if (!other || a === b || D.stream[a.i] !== D.stream[b.i] || !has(other.p)) return null;
  return { p: other.p, word: other.vs, tests: byStream.get(D.stream[a.i]).filter((r) => has(r.p)).length };
}
function holmNote(a, b) {
  const found = adjusted(a, b);
  return found ? el('p', {}, `In the leaderboard p is adjusted for all ${plural(found.tests, 'row')} tested against the best (Holm): p = ${pvalue(found.p)}, ${found.word}.`) : null;
}

function picker(id, chosen, other, flip) {
  const list = el('select', { id, onchange: () => { const row = KEYS.get(list.value); location.hash = flip ? versusHash(other, row) : versusHash(row, other); } });
  const groups = [...byStream.keys()].sort((x, y) => (y === D.stream[other.i]) - (x === D.stream[other.i]) || x - y);
  for (const place of groups) {
    const rows = byStream.get(place).filter((r) => r.n);
    if (rows.length) list.append(el('optgroup', { label: briefly(streamName(D.streams[place]), 60) }, rows.map((r) => el('option', { value: r.key, selected: r === chosen }, briefly(`${label(r)} \u00b7 ${r.model} \u00b7 ${per(r.mean)} %`, 70)))));
  }
  return list;
}

function showVersus(a, b) {
  const main = byId('versus');
  const j = judge(a, b);
  const t = j.test;
  const side = (row, k, flip) => el('div', { class: `side ${k.toLowerCase()}` }, el('label', { for: `pick-${k}` }, k), picker(`pick-${k}`, row, row === a ? b : a, flip), el('p', { class: 'big' }, per(row.mean), el('small', {}, '\u2009%')), el('p', { class: 'quiet' }, has(row.low) ? `${intervalText(row)} \u00b7 ` : '', `${plural(row.n, 'seed')} \u00b7 ${duration(row.seconds)} \u00b7 ${bytes(row.held)} held`), el('p', {}, link(row, 'All about it')));
  main.replaceChildren(
    el('p', { class: 'back' }, el('a', { href: '#' }, '\u2190 All rows')),
    el('h1', {}, 'Side by side'),
    el('div', { class: 'sides' }, side(a, 'A', false), side(b, 'B', true)),
    el('div', { class: `ruling ${j.kind}` }, el('p', { class: 'word' }, j.verdict),
      t ? el('p', {}, `Difference B ${MINUS} A: ${signed(t.mean, 2)} points`, has(t.low) ? `, 95 % t interval ${signed(t.low, 2)} to ${signed(t.high, 2)}, p = ${pvalue(t.p)}` : '', ` on ${plural(t.n, 'shared seed')} (paired t-test of this one pair${has(t.low) ? '' : '; no spread over seeds'}).`) : null,
      holmNote(a, b),
      j.pairs.length > 1 && j.pairs.length < LEAST ? el('p', { class: 'quiet' }, 'Fewer than five pairs: the test rests on the differences being normal. More seeds would tell more.') : null),
  );
  const figures = el('div', { class: 'figures' });
  main.append(figures, el('div', { class: 'columns' }, ratioTable(a, b), seedTable(j)), differTable(a, b),
    el('section', { class: 'runs' }, el('h2', {}, 'Run them'), el('p', {}, 'A'), commandBox(D.commands[a.i]), el('p', {}, 'B'), commandBox(D.commands[b.i])));
  figures.append(...versusFigures(a, b).filter(Boolean));
}

// Curves over each other, and each set after the last experience.
function versusFigures(a, b) {
  const sides = [['A', a], ['B', b]].map(([k, row]) => ({ row, d: D.details[row.i] || {}, text: `${k} ${briefly(row.learner, 40)}` }));
  const table = (kind) => sides.flatMap(({ row, d, text }) => labelled(unfold(kind, d[kind][0], { sets: row.stream.sets, seeds: d.seeds }), text));
  const all = (kind) => sides.every(({ d }) => d[kind]);
  const one = (kind, from, title, note) => figure({ kind, title, note, name: () => fileName('compare', a.learner, b.learner, kind), sets: () => ({ table: table(from) }) }).node;
  return [
    all('curve') ? one('curves', 'curve', 'Accuracy over experiences', 'Mean over the sets seen and over seeds; shaded from the lowest to the highest seed.') : null,
    all('matrix') && D.stream[a.i] === D.stream[b.i] ? one('sets', 'matrix', 'Each set after the last experience', 'Where one is ahead of the other.') : null,
  ];
}

const ratio = (x, y) => (has(x) && has(y) && x > 0 ? `\u00d7\u2009${Number((y / x).toPrecision(y / x < 10 ? 2 : 3))}` : NONE);
function ratioTable(a, b) {
  const lines = [['Average accuracy', 'step_macro_mean', per], ['Forgetting', 'forgetting_mean', per], ['Plasticity', 'plasticity_mean', per]].map(([name, key, show]) => { const [u, v] = [column(key, a.i), column(key, b.i)]; return [name, show(u), show(v), has(u) && has(v) ? signed(v - u) : NONE]; });
  const costs = [['Time', (r) => r.seconds, duration], ['Bytes held', (r) => r.held, bytes], ['Peak memory', (r) => (has(r.memory) ? r.memory * 1e6 : null), bytes], ['Parameters trained', (r) => column('parameters_trained', r.i), amount], ['Training passes', (r) => column('passes_train_mean', r.i), amount], ['Optimiser steps', (r) => column('steps_mean', r.i), amount], ['Exemplars', (r) => column('exemplars', r.i), amount]];
  return simpleTable('Numbers and costs', ['', 'A', 'B', `B ${MINUS} A, or B / A`], [...lines, ...costs.map(([name, of, show]) => [name, show(of(a)), show(of(b)), ratio(of(a), of(b))])]);
}
const seedTable = (j) => (j.pairs.length ? simpleTable('Shared seeds', ['Seed', 'A', 'B', `B ${MINUS} A`], j.pairs.map((q) => [String(q.seed), per(q.a, 2), per(q.b, 2), signed(q.b - q.a, 2)])) : null);
function differTable(a, b) {
  const [x, y] = [a, b].map((row) => (D.details[row.i] || {}).s);
  if (!x || !y) return null;
  const parts = (list) => new Map(list.map((k) => { const text_ = D.pool[k]; const at = text_.indexOf('='); return [text_.slice(0, at), text_.slice(at + 1)]; }));
  const [p, q] = [parts(x), parts(y)];
  const keys = [...new Set([...p.keys(), ...q.keys()])].filter((k) => p.get(k) !== q.get(k)).sort();
  return keys.length ? simpleTable('Settings that differ', ['', 'A', 'B'], keys.map((k) => [el('code', {}, k), el('bdi', {}, p.get(k) ?? NONE), el('bdi', {}, q.get(k) ?? NONE)]), true) : null;
}
