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
    const floor = stream.floors.every(has) ? ` Floor (exact entropy): ${nats(average(stream.floors))}.` : '';
    byId('pre-streams').append(
      el('article', {},
        el('div', { class: 'headline' }, el('h3', {}, el('bdi', {}, briefly(preName(stream), 60))), el('button', { type: 'button', class: 'small', onclick: () => download(`${fileName('losses', stream.scenario)}.csv`, 'text/csv', preCsv(rows)) }, 'CSV')),
        el('p', { class: 'quiet' }, `${plural(stream.sets.length, 'set')}, ${whole(stream.n.reduce((a, b) => a + b, 0))} ${stream.unit} evaluated before and after each experience.${floor}`),
        top ? el('p', {}, 'Lowest final loss: ', preLink(top), ` ${nats(top.of('final_loss'))}.`, same.length ? [' Not distinguishable from it on shared seeds: ', same.slice(0, 6).flatMap((r, k) => [k ? ', ' : '', preLink(r)]), same.length > 6 ? ` and ${same.length - 6} more` : '', '.'] : null, unknown.length ? ` Too few shared seeds, or no spread over them, to tell: ${plural(unknown.length, 'row')}.` : null) : null,
        sortedTable(rows, PRECOLUMNS, 'Final loss', false, `Losses on ${stream.scenario}`),
        el('div', { class: 'figures' }, tradeFigure(rows, stream))));
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

// What is kept against what is learned: each row by its final loss on the newest set and on the old ones.
function tradeFigure(rows, stream) {
  const known = rows.filter((r) => has(r.of('newest_loss')) && has(r.of('retained_loss')));
  if (known.length < 2) return null;
  return figure({
    title: 'Old sets against the newest',
    note: `Final loss on both, ${stream.measure}: lower left is better. Rings: references. A line joins the replay shares of a learner.`,
    wide: true,
    name: () => fileName('trade', stream.scenario),
    table: () => [['learner', 'replay', 'newest_loss', 'retained_loss'], ...known.map((r) => [r.learner, r.replay, tableValue(r.of('newest_loss')), tableValue(r.of('retained_loss'))])],
    draw: (p, width) => {
      const picture = canvas(width, 380, p);
      const box = { left: 52, right: width - 18, top: 26, bottom: 334 };
      const x = plainAxis(known.map((r) => r.of('newest_loss')), 'loss on the newest set', (v) => String(Number(v.toPrecision(4))));
      const { px, py } = axes(picture, p, box, { ...x, ticks: ticks(x.low, x.high, Math.max(3, width / 130)), grid: true }, plainAxis(known.map((r) => r.of('retained_loss')), 'loss on old sets', (v) => String(Number(v.toPrecision(4)))));
      const learners = [...new Set(known.filter((r) => !r.reference).map((r) => r.learner))];
      const ink = (r) => (r.reference ? p.soft : p.series[learners.indexOf(r.learner) % p.series.length]);
      for (const name of learners) {
        const own = known.filter((r) => r.learner === name && has(r.replay)).sort((a, b) => a.replay - b.replay);
        if (own.length > 1) picture.append(svg('path', { d: path(own.map((r) => [r.of('newest_loss'), r.of('retained_loss')]), px, py), fill: 'none', stroke: ink(own[0]), 'stroke-width': 1.1, opacity: 0.6 }));
      }
      for (const r of known) {
        const [cx, cy] = [px(r.of('newest_loss')), py(r.of('retained_loss'))];
        const dot = r.reference ? svg('circle', { cx, cy, r: 4.2, fill: p.ground, stroke: p.soft, 'stroke-width': 1.8 }) : svg('circle', { cx, cy, r: 4.2, fill: ink(r) });
        picture.append(titled(svg('a', { href: `#loss=${encodeURIComponent(r.key)}`, 'aria-label': r.label }, dot), `${r.label}: old ${nats(r.of('retained_loss'), 3)}, newest ${nats(r.of('newest_loss'), 3)}`));
        if (known.length <= 30) picture.append(label_(cx + (cx > box.right - 130 ? -7 : 7), cy - 6, briefly(r.label, 22), { 'font-size': 10.5, fill: p.quiet, 'text-anchor': cx > box.right - 130 ? 'end' : 'start' }));
      }
      return picture;
    },
  }).node;
}

// --- one row -------------------------------------------------------------------------------------------------------
function showLoss(row) {
  const d = D.losses.details[row.i];
  const runs = d ? d.r.map(([matrix, course], k) => ({ seed: row.runs[k][0], matrix, course })) : [];
  const courses = runs.filter((r) => r.course && r.course.x.join() === (runs.find((q) => q.course) || r).course.x.join()).map((r) => r.course);
  const pm = (name) => (has(row.std(name)) ? `\u00b1 ${nats(row.std(name))} over seeds` : '');
  const number = (name, title) => fact(title, nats(row.of(name)), pm(name));
  byId('row').replaceChildren(
    el('p', { class: 'back' }, el('a', { href: '#pre' }, '\u2190 All rows')),
    el('div', { class: 'headline' }, el('h1', {}, el('bdi', {}, briefly(row.label, 90)))),
    el('p', { class: 'chips' }, [['scenario', row.stream.scenario], ['model', row.model], ['variant', row.variant], ['manifest', row.stream.manifest], ['marks', row.marks]].filter(([, v]) => v).map(([k, v]) => el('span', {}, el('small', {}, k), ' ', el('bdi', {}, v)))),
    el('dl', { class: 'factsheet' }, fact('Final loss', nats(row.of('final_loss')), has(row.low) ? `95 % interval ${nats(row.low)}\u2013${nats(row.high)}` : 'no interval from one seed'),
      number('retained_loss', 'On old sets'), number('newest_loss', 'On the newest set'), number('forgetting_after', 'Forgetting'), number('regret', 'Regret'), number('gap_depth', 'Stability gap'), number('anneal_gain_new', 'Anneal gain'), number('final_bpb', 'Bits per byte'), fact('Trained on', amount(trained(row)), `${row.stream.unit}, trunk and branch`), fact('Time', duration(row.seconds), `mean of ${plural(row.n, 'run')}`)),
    el('section', {}, el('h2', {}, 'Run it'), commandBox(row.command)),
    el('div', { class: 'figures' }, [courses.length ? courseFigure(row, courses) : null, d ? lossMatrix(row, d.m, runs) : null, courses.length ? gapFigure(row, courses) : null, d && d.r.length === row.n ? null : el('p', { class: 'notice' }, 'To keep this page small, single seeds of this row were left out; the records hold them.')]),
    el('div', { class: 'columns' }, lossRuns(row), lossNumbers(row)));
}

// Loss on every set over tokens, with boundaries and floors; the learning rate below. Mean of the seeds, their range shaded.
function courseFigure(row, courses) {
  const { sets, floors } = row.stream;
  const xs = courses[0].x;
  const at = (j, pick) => xs.map((_, i) => pick(courses.map((c) => c.loss[j][i]).filter(has)));
  const mean = sets.map((_, j) => at(j, average));
  const rate = xs.map((_, i) => average(courses.map((c) => c.lr[i])));
  return figure({
    title: `Loss over ${row.stream.unit}, learning rate`,
    note: `On the first sequences of each set${courses.length > 1 ? `, mean of ${plural(courses.length, 'seed')}, shaded from the lowest to the highest` : ''}. Dotted: where an experience begins.${floors.some(has) ? ' Dashed: the exact floor of the whole set; that of these few sequences lies near it.' : ''}`,
    wide: true,
    name: () => fileName(row.stream.scenario, row.label, 'course'),
    table: () => [[row.stream.unit, 'experience', 'step', 'learning rate', ...sets], ...xs.map((x, i) => [x, courses[0].experience[i] + 1, courses[0].step[i], rate[i], ...mean.map((line) => tableValue(line[i]))])],
    draw: (p, width) => {
      const picture = canvas(width, 430, p);
      const box = { left: 52, right: width - (sets.length <= 14 && width > 420 ? 96 : 16), top: 24, bottom: 286 };
      const x = { low: Math.min(...xs), high: Math.max(...xs), show: amount, name: `${row.stream.unit} trained on`, bare: true };
      x.ticks = ticks(x.low, x.high, Math.max(3, width / 110));
      const lower = { ...box, top: 314, bottom: 388 };
      const values = [...mean.flat(), ...floors, ...courses.flatMap((c) => c.loss.flat())];
      const { px, py } = axes(picture, p, box, x, plainAxis(values, `loss, ${row.stream.measure}`, (v) => String(Number(v.toPrecision(3)))));
      const below = axes(picture, p, lower, { ...x, bare: false }, { low: 0, high: Math.max(...rate.filter(has), 1e-12), ticks: ticks(0, Math.max(...rate.filter(has), 1e-12), 3), show: (v) => String(Number(v.toPrecision(3))), name: 'learning rate' });
      for (const edge of courses[0].edges) for (const area of [box, lower]) picture.append(svg('line', { x1: px(edge), x2: px(edge), y1: area.top, y2: area.bottom, stroke: p.quiet, 'stroke-width': 1, 'stroke-dasharray': '1 3' }));
      const ink = (j) => p.series[j % p.series.length];
      mean.forEach((line, j) => {
        if (has(floors[j])) picture.append(titled(svg('line', { x1: box.left, x2: box.right, y1: py(floors[j]), y2: py(floors[j]), stroke: ink(j), 'stroke-width': 0.9, 'stroke-dasharray': '5 4', opacity: 0.75 }), `${sets[j]}: floor ${nats(floors[j])}`));
        if (courses.length > 1) {
          const area = [...at(j, (v) => Math.max(...v)).map((v, i) => [xs[i], v]), ...at(j, (v) => Math.min(...v)).map((v, i) => [xs[i], v]).reverse()];
          picture.append(svg('path', { d: `${path(area, px, py)}Z`, fill: ink(j), opacity: 0.16 }));
        }
        picture.append(titled(svg('path', { d: path(line.map((v, i) => [xs[i], v]), px, py), fill: 'none', stroke: ink(j), 'stroke-width': 1.6, 'stroke-linejoin': 'round' }), sets[j]));
      });
      picture.append(svg('path', { d: path(rate.map((v, i) => [xs[i], v]), below.px, below.py), fill: 'none', stroke: p.ink, 'stroke-width': 1.3 }));
      if (sets.length <= 14 && width > 420) picture.append(...endLabels(mean.map((line, j) => ({ y: py(line[line.length - 1]), text: briefly(sets[j], 13), ink: ink(j) })), box.right + 7, box.top, box.bottom));
      return picture;
    },
  }).node;
}

// Losses before the first and after each experience: a line for each, a column for each set.
function lossMatrix(row, mean, runs) {
  const seeds = runs.filter((r) => r.matrix);
  const state = { matrix: mean };
  const select = el('select', { id: 'loss-run', onchange: () => { state.matrix = select.value === '' ? mean : seeds[Number(select.value)].matrix; made.redraw(); } }, el('option', { value: '' }, `mean of ${plural(row.n, 'seed')}`), seeds.map((r, k) => el('option', { value: k }, `seed ${r.seed}`)));
  const { sets } = row.stream;
  const made = figure({
    title: 'Loss before and after each experience',
    note: `Loss (${row.stream.measure}) on each set; light is low.`,
    name: () => fileName(row.stream.scenario, row.label, 'loss_matrix'),
    table: () => [['after', ...sets, 'mean'], ...state.matrix.map((line, i) => [i ? String(i) : 'before', ...line.map(tableValue), tableValue(average(line))])],
    draw: (p, width) => {
      const columns = sets.length + 1;
      const cell = Math.min(96, (width - 60) / (columns + 0.15));
      const tall = Math.max(16, Math.min(40, cell * 0.7));
      const picture = canvas(width, 44 + state.matrix.length * tall + 10, p);
      const known = state.matrix.flat().filter(has);
      const [low, high] = [Math.min(...known), Math.max(...known)];
      const size = Math.min(12.5, cell * 0.28, tall * 0.6);
      [...sets, 'mean'].forEach((name, j) => picture.append(label_(58 + (j + 0.5) * cell, 30, briefly(name, Math.max(3, Math.floor(cell / 6.4))), { 'text-anchor': 'middle', 'font-size': 11, fill: p.quiet })));
      state.matrix.forEach((line, i) => {
        const y = 40 + i * tall;
        picture.append(label_(50, y + tall / 2 + 4, i ? String(i) : 'before', { 'text-anchor': 'end', 'font-size': 11, fill: p.quiet }));
        [...line, average(line)].forEach((v, j) => {
          if (!has(v)) return;
          const c = heat((v - low) / (high - low || 1), p);
          picture.append(titled(svg('rect', { x: round(58 + j * cell), y: round(y), width: round(cell - 1.5), height: round(tall - 1.5), rx: 3, fill: c.fill }), `${i ? `after experience ${i}` : 'before'}, ${sets[j] || 'mean'}: ${nats(v)}`));
          if (size >= 7) picture.append(label_(58 + (j + 0.5) * cell, y + tall / 2 + size * 0.36, nats(v, cell < 52 ? 1 : 2), { 'text-anchor': 'middle', 'font-size': round(size), fill: c.ink, 'pointer-events': 'none' }));
        });
      });
      return picture;
    },
    controls: seeds.length > 1 ? el('div', { class: 'controls' }, el('label', { for: 'loss-run' }, 'Show '), select) : null,
  });
  return made.node;
}

// The stability gap: the rise on old sets above their loss at the boundary, over steps, a line for each later experience.
function gapFigure(row, courses) {
  const { first } = row.stream;
  const c = courses[0];
  const later = [...new Set(c.experience)].filter((k) => first.some((own) => own < k));
  const lines = later.map((k) => {
    const at = c.experience.map((e, i) => (e === k ? i : -1)).filter((i) => i >= 0);
    const old = first.map((own, j) => j).filter((j) => first[j] < k);
    const rise = (i) => average(courses.flatMap((q) => old.map((j) => (has(q.loss[j][i]) && has(q.loss[j][at[0]]) ? q.loss[j][i] - q.loss[j][at[0]] : null))));
    return { k, points: at.map((i) => [c.step[i], rise(i)]).filter(([s]) => s >= 1) };
  }).filter((line) => line.points.length);
  if (!lines.length) return null;
  return figure({
    title: 'Stability gap',
    note: `Rise of the loss on old sets above that at the boundary, mean over ${courses.length > 1 ? 'sets and seeds' : 'sets'}; steps on a logarithmic axis.`,
    name: () => fileName(row.stream.scenario, row.label, 'gap'),
    table: () => [['experience', 'step', 'rise'], ...lines.flatMap((line) => line.points.map(([s, v]) => [line.k + 1, s, tableValue(v)]))],
    draw: (p, width) => {
      const picture = canvas(width, 300, p);
      const box = { left: 52, right: width - 104, top: 24, bottom: 254 };
      const high = Math.max(2, ...lines.flatMap((line) => line.points.map(([s]) => s)));
      const { px, py } = axes(picture, p, box, { low: 1, high, log: true, ticks: logTicks(1, high), show: general, name: 'steps after the boundary' }, plainAxis([0, ...lines.flatMap((line) => line.points.map(([, v]) => v))], `rise, ${row.stream.measure}`, (v) => String(Number(v.toPrecision(3))).replace('-', MINUS)));
      picture.append(svg('line', { x1: box.left, x2: box.right, y1: py(0), y2: py(0), stroke: p.line }));
      lines.forEach((line, k) => {
        const ink = p.series[k % p.series.length];
        picture.append(titled(svg('path', { d: path(line.points, px, py), fill: 'none', stroke: ink, 'stroke-width': 1.6 }), `experience ${line.k + 1}`));
        for (const [s, v] of line.points) if (has(v)) picture.append(titled(svg('circle', { cx: px(s), cy: py(v), r: 2.2, fill: ink }), `experience ${line.k + 1}, step ${s}: ${nats(v, 3)}`));
      });
      if (lines.length <= 14) picture.append(...endLabels(lines.map((line, k) => ({ y: py(line.points[line.points.length - 1][1]), text: `experience ${line.k + 1}`, ink: p.series[k % p.series.length] })), box.right + 7, box.top, box.bottom));
      return picture;
    },
  }).node;
}

const lossRuns = (row) => runsTable(['Final', 'Old sets', 'Newest', 'Forgetting', 'Gap', 'Time'], row.runs.map(([seed, id, ...values]) => [seed, id, ...values.slice(0, -1).map((v) => nats(v)), duration(values[values.length - 1])]));
function lossNumbers(row) {
  const lines = Object.entries(D.losses.about).filter(([name]) => has(row.of(name))).map(([name, formula]) => [name, nats(row.of(name)), nats(row.std(name)), formula]);
  const words = { flops: 'floating-point operations', replay_bytes: 'bytes of old text held' };
  const ledger = Object.entries(row.ledger).filter(([, v]) => has(v)).map(([name, v]) => [name, amount(v), null, words[name] || 'tokens, largest over the runs']);
  return formulasTable('Every number', 'Every number of this row, mean and standard deviation over seeds, and its ledger', [...lines, ...ledger]);
}
