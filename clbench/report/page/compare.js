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

// What shared seeds say about last accuracy: { pairs, statistics, verdict, why }.
function judge(a, b) {
  const seeds = new Map(a.runs.map((r) => [r.seed, r]));
  const pairs = b.runs.filter((r) => seeds.has(r.seed) && has(r.last) && has(seeds.get(r.seed).last)).map((r) => ({ seed: r.seed, a: seeds.get(r.seed).last, b: r.last }));
  const test = paired(pairs.map((q) => q.b - q.a));
  const out = { pairs, test };
  if (a === b) return { ...out, kind: 'unknown', verdict: 'These are the same row.' };
  if (D.stream[a.i] !== D.stream[b.i]) return { ...out, kind: 'unknown', pairs: [], verdict: 'Not comparable: the rows come from different streams (other samples, classes or order), so no difference is tested.' };
  if (a.legacy || b.legacy) return { ...out, kind: 'unknown', verdict: 'No verdict: a legacy row holds numbers of other code.' };
  if (pairs.length < 2) return { ...out, kind: 'unknown', verdict: `Cannot be told: ${pairs.length ? 'one seed is' : 'no seeds are'} shared, two are the least.` };
  if (!has(test.p)) return { ...out, kind: 'unknown', verdict: 'Cannot be told: the difference is the same on every shared seed, and identical runs count once.' };
  if (test.p >= 0.05) return { ...out, kind: 'same', verdict: test.level ? 'Identical on all shared seeds.' : 'Not distinguishable on shared seeds.' };
  const winner = test.mean > 0 ? b : a;
  const strict = adjusted(a, b);
  if (strict && strict.p >= 0.05) return { ...out, kind: 'same', verdict: `${winner === a ? 'A' : 'B'}, ${label(winner)}, is ahead by ${per(Math.abs(test.mean))} points, but not distinguishable when p is adjusted for all ${strict.tests} rows tested against the best.` };
  const note = a.reference || b.reference ? ' One of them is a reference that keeps all data.' : '';
  return { ...out, kind: 'better', winner, verdict: `${winner === a ? 'A' : 'B'}, ${label(winner)}, is better by ${per(Math.abs(test.mean))} points of last accuracy.${note}` };
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
      j.pairs.length ? el('p', {}, `Difference B ${MINUS} A: ${signed(t.mean, 2)} points`, has(t.low) ? `, 95 % t interval ${signed(t.low, 2)} to ${signed(t.high, 2)}, p = ${pvalue(t.p)}` : '', ` on ${plural(j.pairs.length, 'shared seed')} (paired t-test of this one pair${t.level ? '; no spread over seeds' : ''}).`) : null,
      holmNote(a, b),
      j.pairs.length > 1 && j.pairs.length < 5 ? el('p', { class: 'quiet' }, 'Fewer than five pairs: the test rests on the differences being normal. More seeds would tell more.') : null),
  );
  const figures = el('div', { class: 'figures' });
  main.append(figures, el('div', { class: 'columns' }, ratioTable(a, b), seedTable(j)), differTable(a, b),
    el('section', { class: 'runs' }, el('h2', {}, 'Run them'), el('p', {}, 'A'), commandBox(D.commands[a.i]), el('p', {}, 'B'), commandBox(D.commands[b.i])));
  const [da, db] = [detail(a), detail(b)];
  if (da.curve && db.curve && da.lower === db.lower) figures.append(overFigure(a, b, da, db));
  if (da.mean && db.mean && !da.lower && !db.lower && D.stream[a.i] === D.stream[b.i]) figures.append(dumbbell(a, b, da, db));
}

function overFigure(a, b, da, db) {
  return figure({
    title: `${da.lower ? 'Loss' : 'Accuracy'} over experiences`,
    note: 'Mean over the sets seen. Bold: mean over seeds; thin: seeds.',
    name: () => fileName('compare', a.learner, b.learner, 'curves'),
    table: () => [['after experience', `A ${a.learner}`, `B ${b.learner}`, 'B - A'], ...Array.from({ length: Math.max(da.curve.length, db.curve.length) }, (_, i) => [i + 1, tableValue(da.curve[i]), tableValue(db.curve[i]), has(da.curve[i]) && has(db.curve[i]) ? tableValue(db.curve[i] - da.curve[i]) : null])],
    draw: (p, width) => {
      const picture = canvas(width, 300, p);
      const box = { left: 42, right: width - 58, top: 24, bottom: 256 };
      const size = Math.max(da.curve.length, db.curve.length);
      const all = [da, db].flatMap((d) => [...d.curve, ...d.runs.flatMap((r) => r.curve || [])]);
      const { px, py } = axes(picture, p, box, { low: 1, high: Math.max(2, size), ticks: Array.from({ length: size }, (_, i) => i + 1), show: String, name: 'after experience' }, da.lower ? plainAxis(all, 'loss') : shareAxis(all, 'per cent'));
      const ends = [];
      [[da, p.a, 'A'], [db, p.b, 'B']].forEach(([d, ink, k]) => {
        const points = (curve) => curve.map((v, i) => [i + 1, v]);
        for (const run of d.runs) if (run.curve && d.runs.length > 1) picture.append(titled(svg('path', { d: path(points(run.curve), px, py), fill: 'none', stroke: ink, 'stroke-width': 1, opacity: 0.4 }), `${k} seed ${run.seed}`));
        picture.append(svg('path', { d: path(points(d.curve), px, py), fill: 'none', stroke: ink, 'stroke-width': 2.6, 'stroke-dasharray': k === 'B' ? '7 3' : null }));
        points(d.curve).forEach(([x, v]) => { if (has(v)) picture.append(titled(svg('circle', { cx: px(x), cy: py(v), r: 3.2, fill: ink }), `${k} after ${x}: ${valueText(d, v, 2)}`)); });
        const v = d.curve[d.curve.length - 1];
        ends.push({ y: has(v) ? py(v) : null, text: `${k} ${valueText(d, v)}`, ink, bold: true });
      });
      picture.append(...endLabels(ends, box.right + 8, box.top, box.bottom));
      return picture;
    },
  }).node;
}

function dumbbell(a, b, da, db) {
  const sets = a.stream.sets;
  const last = (d) => d.mean[d.mean.length - 1];
  return figure({
    title: 'Each set after the last experience',
    note: 'Where one is ahead of the other.',
    name: () => fileName('compare', a.learner, b.learner, 'sets'),
    table: () => [['set', `A ${a.learner}`, `B ${b.learner}`, 'B - A'], ...sets.map((s, j) => [s, tableValue(last(da)[j]), tableValue(last(db)[j]), has(last(da)[j]) && has(last(db)[j]) ? tableValue(last(db)[j] - last(da)[j]) : null])],
    draw: (p, width) => {
      const tall = Math.max(8, Math.min(30, 600 / sets.length));
      const left = Math.min(width * 0.3, 14 + 6.4 * Math.max(...sets.map((s) => Math.min(18, s.length))));
      const picture = canvas(width, 14 + sets.length * tall + 44, p);
      const box = { left, right: width - 56, top: 10, bottom: 10 + sets.length * tall };
      const x = { ...shareAxis([...last(da), ...last(db)], ''), name: 'per cent', grid: true };
      const { px } = axes(picture, p, box, x, { low: 0, high: 1, ticks: [], show: String });
      sets.forEach((name, j) => {
        const [u, v] = [last(da)[j], last(db)[j]];
        const y = round(box.top + (j + 0.5) * tall);
        if (tall >= 11 || j % 4 === 0) picture.append(label_(left - 8, y + 4, briefly(name, 18), { 'text-anchor': 'end', 'font-size': 11 }));
        if (!has(u) || !has(v)) return;
        picture.append(svg('line', { x1: px(u), x2: px(v), y1: y, y2: y, stroke: v > u ? p.b : p.a, 'stroke-width': 2, opacity: 0.5 }),
          titled(svg('circle', { cx: px(u), cy: y, r: 4.4, fill: p.a }), `A, ${name}: ${per(u, 2)} %`), titled(svg('rect', { x: px(v) - 4, y: y - 4, width: 8, height: 8, fill: p.b }), `B, ${name}: ${per(v, 2)} %`));
        if (tall >= 11) picture.append(label_(width - 48, y + 4, signed(v - u), { 'font-size': 11, fill: p.quiet }));
      });
      return picture;
    },
  }).node;
}

const ratio = (x, y) => (has(x) && has(y) && x > 0 ? `\u00d7\u2009${Number((y / x).toPrecision(y / x < 10 ? 2 : 3))}` : NONE);
function ratioTable(a, b) {
  const lines = [['Average accuracy', 'step_macro_mean', per], ['Forgetting', 'forgetting_mean', per], ['Plasticity', 'plasticity_mean', per]].map(([name, key, show]) => { const [u, v] = [column(key, a.i), column(key, b.i)]; return [name, show(u), show(v), has(u) && has(v) ? signed(v - u) : NONE]; });
  const costs = [['Time', (r) => r.seconds, duration], ['Bytes held', (r) => r.held, bytes], ['Peak memory', (r) => (has(r.memory) ? r.memory * 1e6 : null), bytes], ['Parameters trained', (r) => column('parameters_trained', r.i), amount], ['Training passes', (r) => column('passes_train_mean', r.i), amount], ['Optimiser steps', (r) => column('steps_mean', r.i), amount], ['Exemplars', (r) => column('exemplars', r.i), amount]];
  return simpleTable('Numbers and costs', ['', 'A', 'B', `B ${MINUS} A, or B / A`], [...lines, ...costs.map(([name, of, show]) => [name, show(of(a)), show(of(b)), ratio(of(a), of(b))])]);
}
const seedTable = (j) => (j.pairs.length ? simpleTable('Shared seeds', ['Seed', 'A', 'B', `B ${MINUS} A`], j.pairs.map((q) => [String(q.seed), per(q.a, 2), per(q.b, 2), signed(q.b - q.a, 2)])) : null);
function differTable(a, b) {
  const [x, y] = [detail(a).settings, detail(b).settings];
  if (!x || !y) return null;
  const parts = (list) => new Map(list.map((k) => { const text_ = D.pool[k]; const at = text_.indexOf('='); return [text_.slice(0, at), text_.slice(at + 1)]; }));
  const [p, q] = [parts(x), parts(y)];
  const keys = [...new Set([...p.keys(), ...q.keys()])].filter((k) => p.get(k) !== q.get(k)).sort();
  return keys.length ? simpleTable('Settings that differ', ['', 'A', 'B'], keys.map((k) => [el('code', {}, k), el('bdi', {}, p.get(k) ?? NONE), el('bdi', {}, q.get(k) ?? NONE)]), true) : null;
}
