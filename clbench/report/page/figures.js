// The figures of one row.
const unit = (d) => (d.lower ? 'loss' : '%');
const valueText = (d, v, digits = 1) => (d.lower ? general(v) : per(v, digits));
const tableValue = (v) => (has(v) ? Number(v.toFixed(6)) : null);

// Accuracy matrix: a line for each experience, a column for each set, the mean over the sets seen at the right.
function heatFigure(row, d) {
  const choices = [['mean', d.runs.length > 1 || d.poor ? `mean of ${plural(row.n, 'seed')}` : 'the run'], ...(d.runs.length > 1 ? d.runs.filter((r) => r.matrix).map((r, k) => [String(k), `seed ${r.seed}`]) : [])];
  const state = { which: 'mean', stretch: false };
  const matrix = () => (state.which === 'mean' ? d.mean : d.runs.filter((r) => r.matrix)[Number(state.which)].matrix);
  const select = el('select', { id: 'heat-run', onchange: () => { state.which = select.value; made.redraw(); } }, choices.map(([value, text]) => el('option', { value }, text)));
  const stretch = el('input', { type: 'checkbox', id: 'heat-range', onchange: () => { state.stretch = stretch.checked; made.redraw(); } });
  const controls = el('div', { class: 'controls' }, choices.length > 1 ? [el('label', { for: 'heat-run' }, 'Show '), select] : null, el('label', {}, stretch, ' Stretch colours over the values'));
  const sets = row.stream.sets;
  const name = d.lower ? 'Loss after each experience' : 'Accuracy after each experience';
  const made = figure({
    title: name,
    note: d.lower ? 'Mean loss per token or sample; lower is better.' : 'Per cent right on each test set. The right-hand column is the mean over the sets seen.',
    name: () => fileName(row.scenario, row.learner, row.key, 'matrix', state.which === 'mean' ? '' : choices.find(([k]) => k === state.which)[1]),
    table: () => { const m = matrix(); const k = macro(m, d.first); return [['after experience', ...sets, 'macro'], ...m.map((line, i) => [i + 1, ...line.map(tableValue), tableValue(k[i])])]; },
    draw: (p, width) => drawHeat(p, width, matrix(), d, sets, state.stretch),
    controls,
  });
  return made.node;
}

function drawHeat(p, width, matrix, d, sets, stretch) {
  const [rows, columns] = [matrix.length, matrix[0].length];
  const mean = macro(matrix, d.first);
  const known = matrix.flat().filter(has);
  const lowest = Math.min(...known);
  const highest = Math.max(...known);
  const range = stretch || d.lower ? [lowest, highest] : [0, 1];
  const left = 36;
  const space = columns <= 40 ? 8 : 4;
  const cell = Math.min(84, (width - left - space - 4) / (columns + 1.15));
  const tall = Math.max(rows > 40 ? 6 : 14, Math.min(40, cell * 0.72, 900 / rows));
  const slanted = sets.some((s) => s.length * 6 > cell - 3);
  const step = Math.max(1, Math.ceil((slanted ? 13 : 0) / cell));
  const top = slanted ? 10 + Math.min(84, 5.2 * Math.max(3, ...sets.map((s) => Math.min(14, s.length)))) : 24;
  const wide = left + columns * cell + space + cell * 1.15;
  const picture = canvas(Math.max(width, wide), top + rows * tall + 46, p);
  const words = svg('g', { fill: p.quiet, 'font-size': 11 });
  const cells = svg('g', {});
  const digits = d.lower ? 2 : cell >= 36 ? 1 : 0;
  const size = Math.min(12.5, cell * (digits ? 0.32 : 0.44), tall * 0.62);
  sets.forEach((name, j) => {
    if (j % step) return;
    const x = left + (j + 0.5) * cell;
    words.append(slanted ? label_(0, 0, briefly(name, 14), { transform: `translate(${round(x + 3)} ${top - 7}) rotate(-50)` }) : label_(x, top - 8, name, { 'text-anchor': 'middle' }));
  });
  words.append(label_(left + columns * cell + space + cell * (cell > 26 ? 0.575 : 1.15), top - 8, 'mean', { 'text-anchor': cell > 26 ? 'middle' : 'end', fill: p.ink }));
  const put = (v, x, y, w, note, bold) => {
    const share = (v - range[0]) / (range[1] - range[0] || 1);
    const c = has(v) ? heat(d.lower ? 1 - share : share, p) : null;
    const box = svg('rect', { x: round(x), y: round(y), width: round(Math.max(1, w - 1.5)), height: round(Math.max(1, tall - 1.5)), rx: Math.min(3, tall / 6), fill: c ? c.fill : 'none', stroke: c ? null : p.grid });
    cells.append(titled(box, `${note}: ${has(v) ? `${valueText(d, v, 2)} ${unit(d)}` : 'not evaluated'}`));
    if (c && size >= 7) cells.append(label_(x + w / 2 - 0.75, y + tall / 2 + size * 0.36 - 0.5, d.lower ? fixed(v, digits) : per(v, digits).replace('100.0', '100'), { 'text-anchor': 'middle', 'font-size': round(size), fill: c.ink, 'font-weight': bold ? 650 : 400, 'pointer-events': 'none' }));
  };
  matrix.forEach((line, i) => {
    const y = top + i * tall;
    if (tall >= 11 || i % 5 === 4) words.append(label_(left - 8, y + tall / 2 + 4, i + 1, { 'text-anchor': 'end' }));
    line.forEach((v, j) => put(v, left + j * cell, y, cell, `after experience ${i + 1}, ${sets[j]}`));
    put(mean[i], left + columns * cell + space, y, cell * 1.15, `after experience ${i + 1}, mean over the sets seen`, true);
  });
  words.append(label_(left - 8, top - 8, 'after', { 'text-anchor': 'end' }));
  const foot = top + rows * tall + 16;
  for (let k = 0; k < 24; k += 1) cells.append(svg('rect', { x: left + k * 5, y: foot, width: 5.3, height: 8, fill: heat(d.lower ? 1 - (k + 0.5) / 24 : (k + 0.5) / 24, p).fill }));
  words.append(label_(left, foot + 21, `${valueText(d, range[0], stretch ? 1 : 0)}`), label_(left + 120, foot + 21, `${valueText(d, range[1], stretch ? 1 : 0)} ${unit(d)}`, { 'text-anchor': 'middle' }));
  picture.append(words, cells);
  return picture;
}

// Curves over experiences: each set from its own experience on, the macro mean with the range of the seeds.
function curveFigure(row, d) {
  const name = d.lower ? 'Loss over experiences' : 'Accuracy over experiences';
  const sets = row.stream.sets;
  const runs = d.runs.filter((r) => r.curve);
  return figure({
    title: name,
    note: `Bold: mean over the sets seen${runs.length > 1 ? ', shaded from the lowest to the highest seed' : ''}. Thin: each set, from its own experience on.`,
    name: () => fileName(row.scenario, row.learner, row.key, 'curves'),
    table: () => [['after experience', 'macro', ...runs.map((r) => `macro, seed ${r.seed}`), ...(d.mean ? sets : [])], ...d.curve.map((v, i) => [i + 1, tableValue(v), ...runs.map((r) => tableValue(r.curve[i])), ...(d.mean ? d.mean[i].map(tableValue) : [])])],
    draw: (p, width) => {
      const lines = d.mean ? sets.map((_, j) => d.mean.map((l, i) => [i + 1, i >= d.first[j] ? l[j] : null])) : [];
      const values = [...d.curve, ...lines.flat().map(([, v]) => v), ...runs.flatMap((r) => r.curve)];
      const size = d.curve.length;
      const picture = canvas(width, 290, p);
      const box = { left: 42, right: width - (sets.length <= 14 && width > 420 ? 74 : 44), top: 24, bottom: 246 };
      const y = d.lower ? plainAxis(values, 'loss') : shareAxis(values, 'per cent');
      const { px, py } = axes(picture, p, box, { low: 1, high: Math.max(2, size), ticks: d.curve.map((_, i) => i + 1), show: String, name: 'after experience' }, y);
      const colour = (j) => ordered(sets.length > 1 ? j / (sets.length - 1) : 1, p);
      const thin = svg('g', { fill: 'none', 'stroke-width': 1.3, opacity: 0.85 });
      lines.forEach((points, j) => {
        thin.append(titled(svg('path', { d: path(points, px, py), stroke: colour(j) }), sets[j]));
        points.forEach(([x, v], i) => { if (has(v) && (i === d.first[j] || size <= 12)) thin.append(titled(svg('circle', { cx: px(x), cy: py(v), r: 2, fill: colour(j), stroke: 'none' }), `${sets[j]}, after ${x}: ${valueText(d, v, 2)}`)); });
      });
      picture.append(thin);
      if (runs.length > 1) {
        const edge = (pick) => d.curve.map((_, i) => [i + 1, pick(...runs.map((r) => r.curve[i]).filter(has))]);
        const points = [...edge(Math.max), ...edge(Math.min).reverse()].filter(([, v]) => has(v));
        picture.append(svg('path', { d: `${path(points, px, py)}Z`, fill: p.a, opacity: 0.2 }));
      }
      const main = d.curve.map((v, i) => [i + 1, v]);
      picture.append(svg('path', { d: path(main, px, py), fill: 'none', stroke: p.ink, 'stroke-width': 2.6, 'stroke-linejoin': 'round' }));
      for (const [x, v] of main) if (has(v)) picture.append(titled(svg('circle', { cx: px(x), cy: py(v), r: 3.2, fill: p.ink }), `mean after ${x}: ${valueText(d, v, 2)}`));
      const labels = [{ y: has(d.curve[size - 1]) ? py(d.curve[size - 1]) : null, text: `${width > 420 && sets.length <= 14 ? 'mean ' : ''}${valueText(d, d.curve[size - 1])}`, ink: p.ink, bold: true }];
      if (sets.length <= 14 && width > 420) lines.forEach((points, j) => { const v = points[size - 1][1]; labels.push({ y: has(v) ? py(v) : null, text: briefly(sets[j], 10), ink: colour(j) }); });
      picture.append(...endLabels(labels, box.right + 7, box.top, box.bottom));
      return picture;
    },
  }).node;
}

// Forgetting of each old set: mean as a bar, seeds as dots.
function forgettingFigure(row, d) {
  const sets = row.stream.sets;
  const seeds = d.runs.filter((r) => r.matrix).map((r) => ({ seed: r.seed, values: forgotten(r.matrix, d.first) }));
  const mean = seeds.length ? sets.map((_, j) => average(seeds.map((s) => s.values[j]))) : forgotten(d.mean, d.first);
  const old = sets.map((_, j) => j).filter((j) => has(mean[j]));
  if (!old.length) return null;
  return figure({
    title: 'Forgetting of each set',
    note: `Best accuracy since its own experience and before the last, minus the last; in points. ${seeds.length > 1 ? 'Dots: seeds. ' : ''}The newest sets have nothing to forget yet.`,
    name: () => fileName(row.scenario, row.learner, row.key, 'forgetting'),
    table: () => [['set', 'mean', ...seeds.map((s) => `seed ${s.seed}`)], ...old.map((j) => [sets[j], tableValue(mean[j]), ...seeds.map((s) => tableValue(s.values[j]))])],
    draw: (p, width) => {
      const tall = Math.max(7, Math.min(26, 420 / old.length));
      const left = Math.min(width * 0.3, 14 + 6.4 * Math.max(...old.map((j) => Math.min(18, sets[j].length))));
      const picture = canvas(width, 34 + old.length * tall + 34, p);
      const values = [0, ...old.map((j) => mean[j]), ...seeds.flatMap((s) => s.values)].filter(has);
      const [low, high] = [Math.min(...values), Math.max(0.02, ...values)];
      const box = { left, right: width - 52, top: 12, bottom: 12 + old.length * tall };
      const { px } = axes(picture, p, box, { low, high, ticks: ticks(low, high, 5), show: (v) => `${Number((100 * v).toPrecision(3))}`.replace('-', MINUS), name: 'points lost', grid: true }, { low: 0, high: 1, ticks: [], show: String });
      old.forEach((j, k) => {
        const y = box.top + k * tall;
        const [x0, x1] = [px(0), px(mean[j])];
        picture.append(titled(svg('rect', { x: Math.min(x0, x1), y: round(y + tall * 0.16), width: Math.max(1, Math.abs(x1 - x0)), height: round(tall * 0.62), rx: 2, fill: mean[j] > 0 ? p.b : p.a, opacity: 0.8 }), `${sets[j]}: ${per(mean[j], 2)} points`));
        if (seeds.length > 1) for (const s of seeds) if (has(s.values[j])) picture.append(titled(svg('circle', { cx: px(s.values[j]), cy: round(y + tall * 0.47), r: 2.6, fill: p.ground, stroke: p.ink, 'stroke-width': 1.1 }), `seed ${s.seed}: ${per(s.values[j], 2)}`));
        if (tall >= 11 || k % 4 === 0) picture.append(label_(left - 8, y + tall * 0.47 + 4, briefly(sets[j], 18), { 'text-anchor': 'end', 'font-size': Math.min(11, tall) }), label_(width - 46, y + tall * 0.47 + 4, signed(mean[j]), { 'font-size': 11, fill: p.quiet }));
      });
      picture.append(svg('line', { x1: px(0), x2: px(0), y1: box.top, y2: box.bottom, stroke: p.line }));
      return picture;
    },
  }).node;
}

// Loss with the learning rate below, of each seed that has them.
function lossFigure(row, d) {
  const runs = d.runs.filter((r) => r.loss);
  if (!runs.length) return null;
  const word = runs[0].loss.unit === 'tokens' ? 'tokens' : 'step';
  const rates = runs.some((r) => r.loss.lr);
  return figure({
    title: rates ? 'Training loss and learning rate' : 'Training loss',
    note: `${runs.length > 1 ? 'A line for each seed. ' : ''}Dotted: where an experience ends.`,
    name: () => fileName(row.scenario, row.learner, row.key, 'loss'),
    table: () => [['seed', word, 'loss', 'lr'], ...runs.flatMap((r) => r.loss.x.map((x, i) => [r.seed, x, r.loss.loss[i], r.loss.lr ? r.loss.lr[i] : null]))],
    draw: (p, width) => {
      const picture = canvas(width, rates ? 380 : 290, p);
      const box = { left: 52, right: width - 14, top: 24, bottom: 236 };
      const xs = runs.flatMap((r) => [...r.loss.x, ...r.loss.edges]);
      const x = { low: Math.min(...xs), high: Math.max(...xs), show: amount, name: word, bare: rates };
      x.ticks = ticks(x.low, x.high, Math.max(3, width / 110));
      const panel = (part, area, kind, name) => {
        const { px, py } = axes(picture, p, area, kind, plainAxis(runs.flatMap((r) => r.loss[part] || []), name, (v) => String(Number(v.toPrecision(3)))));
        for (const edge of new Set(runs.flatMap((r) => r.loss.edges))) picture.append(svg('line', { x1: px(edge), x2: px(edge), y1: area.top, y2: area.bottom, stroke: p.quiet, 'stroke-width': 1, 'stroke-dasharray': '1 3' }));
        runs.forEach((r, k) => { if (r.loss[part]) picture.append(titled(svg('path', { d: path(r.loss.x.map((v, i) => [v, r.loss[part][i]]), px, py), fill: 'none', stroke: p.series[k % p.series.length], 'stroke-width': 1.3, opacity: 0.8 }), `seed ${r.seed}`)); });
      };
      panel('loss', box, x, 'loss');
      if (rates) panel('lr', { ...box, top: 264, bottom: 338 }, { ...x, bare: false }, 'learning rate');
      return picture;
    },
  }).node;
}

// Accuracy at every evaluation inside experiences: where the stability gap is seen.
function stabilityFigure(row, d) {
  const run = d.runs.find((r) => r.trace);
  if (!run) return null;
  const sets = row.stream.sets;
  const points = run.trace.map(([experience, values]) => ({ experience, values: values.map((v) => (has(v) ? v / 1000 : null)) }));
  return figure({
    title: 'Accuracy inside experiences',
    note: `Seed ${run.seed}: every evaluation while learning. Dotted: where an experience begins. A dip of old sets right after it is the stability gap.`,
    name: () => fileName(row.scenario, row.learner, row.key, 'stability'),
    table: () => [['evaluation', 'experience', ...sets], ...points.map((q, i) => [i + 1, q.experience + 1, ...q.values.map(tableValue)])],
    draw: (p, width) => {
      const picture = canvas(width, 290, p);
      const box = { left: 42, right: width - 62, top: 24, bottom: 246 };
      const shown = sets.map((_, j) => points.map((q, i) => [i + 1, q.experience >= d.first[j] ? q.values[j] : null]));
      const { px, py } = axes(picture, p, box, { low: 1, high: Math.max(2, points.length), ticks: ticks(1, points.length, 6), show: String, name: 'evaluation' }, shareAxis([0, ...shown.flat().map(([, v]) => v)], 'per cent'));
      points.forEach((q, i) => { if (i && q.experience !== points[i - 1].experience) picture.append(svg('line', { x1: px(i + 0.5), x2: px(i + 0.5), y1: box.top, y2: box.bottom, stroke: p.quiet, 'stroke-dasharray': '1 3' })); });
      const colour = (j) => ordered(sets.length > 1 ? j / (sets.length - 1) : 1, p);
      shown.forEach((line, j) => picture.append(titled(svg('path', { d: path(line, px, py), fill: 'none', stroke: colour(j), 'stroke-width': 1.6 }), sets[j])));
      if (sets.length <= 14) picture.append(...endLabels(shown.map((line, j) => { const v = line[line.length - 1][1]; return { y: has(v) ? py(v) : null, text: briefly(sets[j], 8), ink: colour(j) }; }), box.right + 7, box.top, box.bottom));
      return picture;
    },
  }).node;
}

// Where the seconds went: optimisation, features and statistics, the rest of learning, evaluation, anything else.
function phases(row) {
  const get = (name) => column(`seconds_${name}_mean`, row.i) || 0;
  const [fit, extract, learn, evaluate] = ['fit', 'extract', 'learn', 'evaluate'].map(get);
  const rest = Math.max(0, learn - fit - extract);
  const other = Math.max(0, (row.seconds || 0) - Math.max(learn, fit + extract) - evaluate);
  return [['optimisation', fit], ['features and statistics', extract], ['other learning', rest], ['evaluation', evaluate], ['set-up and other', other]].map((part, k) => [...part, k]).filter(([, v]) => v > 0);
}
function phaseFigure(row) {
  const parts = phases(row);
  const total = parts.reduce((sum, [, v]) => sum + v, 0);
  if (!total) return null;
  return figure({
    title: 'Where the seconds went',
    note: `Mean of ${plural(row.n, 'run')}: ${duration(row.seconds)} in all.`,
    name: () => fileName(row.scenario, row.learner, row.key, 'seconds'),
    table: () => [['phase', 'seconds'], ...parts.map(([name, v]) => [name, Number(v.toFixed(3))])],
    draw: (p, width) => {
      const columns = Math.max(1, Math.min(3, Math.floor(width / 200)));
      const picture = canvas(width, 60 + 22 * Math.ceil(parts.length / columns), p);
      let x = 0;
      parts.forEach(([name, v, shade], k) => {
        const wide = (v / total) * width;
        if (wide > 0) picture.append(titled(svg('rect', { x: round(x), y: 6, width: round(Math.max(0.5, wide - 1.5)), height: 26, rx: 2, fill: p.phases[shade] }), `${name}: ${duration(v)}`));
        x += wide;
        const [cx, cy] = [(k % columns) * (width / columns), 56 + 22 * Math.floor(k / columns)];
        picture.append(svg('rect', { x: cx, y: cy - 9, width: 10, height: 10, rx: 2, fill: p.phases[shade] }), label_(cx + 16, cy, `${name} `), label_(cx + 22 + 6.1 * name.length, cy, `${((100 * v) / total).toFixed(v / total < 0.1 ? 1 : 0)} %`, { fill: p.quiet }));
      });
      return picture;
    },
  }).node;
}
