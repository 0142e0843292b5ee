// Cost against accuracy on one stream, with the contenders that nobody beats at their cost.
const COSTS_SHOWN = [
  { id: 'seconds', name: 'seconds of a run', of: (r) => r.seconds, show: duration },
  { id: 'held', name: 'bytes held at the end', of: (r) => r.held, show: bytes },
  { id: 'memory', name: 'peak memory', of: (r) => (has(r.memory) ? r.memory * 1e6 : null), show: bytes },
  { id: 'trained', name: 'parameters trained', of: (r) => column('parameters_trained', r.i), show: amount },
];
// Rows that no other row beats: none is as cheap and as good, and better in one of them.
function front(rows, cost) {
  const known = contenders(rows).filter((r) => has(cost(r))).sort((a, b) => cost(a) - cost(b) || b.mean - a.mean);
  const kept = [];
  for (const row of known) {
    const last = kept[kept.length - 1];
    if (!last || row.mean > last.mean || (row.mean === last.mean && cost(row) === cost(last))) kept.push(row);
  }
  return kept;
}

function scatterFigure() {
  if (!STREAMS.length) { byId('cost').hidden = true; return; }
  const largest = STREAMS.reduce((a, b) => (byStream.get(b).length > byStream.get(a).length ? b : a));
  const state = { place: largest, cost: COSTS_SHOWN[0], near: false };
  const all = () => byStream.get(state.place).filter((r) => has(r.mean) && has(state.cost.of(r)));
  const rowsOf = () => { const rows = all(); return state.near ? rows.sort((a, b) => b.mean - a.mean).slice(0, Math.max(2, Math.ceil(rows.length / 2))) : rows; };
  const near = el('input', { type: 'checkbox', onchange: () => { state.near = near.checked; made.redraw(); } });
  const stream = el('select', { id: 'scatter-stream', onchange: () => { state.place = Number(stream.value); made.redraw(); } }, STREAMS.map((place) => el('option', { value: place, selected: place === largest }, briefly(streamName(D.streams[place]), 50))));
  const costs = COSTS_SHOWN.filter((c) => ROWS.some((r) => has(c.of(r))));
  const cost = el('select', { id: 'scatter-cost', onchange: () => { state.cost = COSTS_SHOWN.find((c) => c.id === cost.value); made.redraw(); } }, costs.map((c) => el('option', { value: c.id }, c.name)));
  if (costs.length) state.cost = costs[0];
  const made = figure({
    title: 'Cost against last accuracy',
    note: 'Line: the Pareto front, contenders that no other beats at their cost. Rings: references and legacy rows. Whiskers: 95 % intervals.',
    wide: true,
    name: () => fileName('cost', D.streams[state.place].scenario, state.cost.id),
    table: () => { const on = new Set(front(rowsOf(), state.cost.of)); return [['learner', 'variant', state.cost.name, 'last_macro', 'low', 'high', 'Pareto front'], ...rowsOf().sort((a, b) => b.mean - a.mean).map((r) => [r.learner, r.variant, state.cost.of(r), r.mean, r.low, r.high, r.reference || r.legacy ? 'no contender' : on.has(r) ? 'yes' : 'no'])]; },
    draw: (p, width) => drawScatter(p, width, rowsOf(), state.cost),
    controls: el('div', { class: 'controls' }, el('label', { for: 'scatter-stream' }, 'Stream '), stream, el('label', { for: 'scatter-cost' }, 'Cost '), cost, el('label', {}, near, ' Only the better half')),
  });
  byId('scatter').append(made.node);
}

function drawScatter(p, width, rows, cost) {
  const tall = width < 480 ? 360 : 440;
  const picture = canvas(width, tall, p);
  if (!rows.length) { picture.append(label_(16, 40, 'No row has this cost.', { fill: p.quiet })); return picture; }
  const box = { left: 42, right: width - 18, top: 26, bottom: tall - 46 };
  const costs = rows.map(cost.of);
  let [low, high] = [Math.min(...costs), Math.max(...costs)];
  const log = low > 0 && high / low > 8;
  if (log) { low *= 0.8; high *= 1.35; } else { const pad = (high - low || high || 1) * 0.08; high += pad; low = Math.max(0, low - pad); }
  const x = { low, high, log, ticks: log ? logTicks(low, high) : ticks(low, high, Math.max(3, width / 120)), show: cost.show, name: `${cost.name}${log ? ' (logarithmic)' : ''}`, grid: true };
  const y = shareAxis(rows.flatMap((r) => [r.mean, r.low, r.high]), 'last accuracy, per cent');
  const { px, py } = axes(picture, p, box, x, y);
  const on = front(rows, cost.of);
  let line = '';
  on.forEach((r, k) => { line += k ? `H${px(cost.of(r))}V${py(r.mean)}` : `M${px(cost.of(r))} ${py(r.mean)}`; });
  if (on.length) picture.append(svg('path', { d: `${line}H${box.right}`, fill: 'none', stroke: p.b, 'stroke-width': 1.6, opacity: 0.75 }));
  const taken = [];
  const words = svg('g', { 'font-size': 11, 'paint-order': 'stroke', stroke: p.ground, 'stroke-width': 3, 'stroke-linejoin': 'round' });
  const front_ = new Set(on);
  const dots = rows.map((row) => {
    const [cx, cy] = [px(cost.of(row)), py(row.mean)];
    taken.push([cx - 5, cy - 5, cx + 5, cy + 5]);
    const aside = row.reference || row.legacy;
    const ink = front_.has(row) ? p.b : p.a;
    const group = svg('a', { href: `#row=${encodeURIComponent(row.key)}`, 'aria-label': `${label(row)}: ${per(row.mean)} per cent, ${cost.show(cost.of(row))}` },
      has(row.low) ? svg('line', { x1: cx, x2: cx, y1: py(row.low), y2: py(row.high), stroke: aside ? p.soft : ink, 'stroke-width': 1.2, opacity: 0.55 }) : null,
      svg('circle', { cx, cy, r: 9, fill: 'transparent' }),
      aside ? svg('circle', { cx, cy, r: 4.2, fill: p.ground, stroke: p.soft, 'stroke-width': 1.8 }) : svg('circle', { cx, cy, r: front_.has(row) ? 5.2 : 4.2, fill: ink, opacity: front_.has(row) ? 1 : 0.75 }));
    return titled(group, `${label(row)}: ${per(row.mean, 2)} %${has(row.low) ? ` (${intervalText(row)})` : ''}, ${cost.show(cost.of(row))}`);
  });
  const order = [...rows].sort((a, b) => front_.has(b) - front_.has(a) || b.mean - a.mean);
  for (const row of order.slice(0, 150)) {
    const name = briefly(label(row), 26);
    const wide = name.length * 6.1;
    const [cx, cy] = [px(cost.of(row)), py(row.mean)];
    const places = [[8, 4], [-8 - wide, 4], [-wide / 2, -9], [-wide / 2, 18], [8, -7], [8, 15], [-8 - wide, -7], [-8 - wide, 15]];
    for (const [dx, dy] of places) {
      const area = [cx + dx, cy + dy - 9, cx + dx + wide, cy + dy + 2];
      if (area[0] < box.left || area[2] > width - 2 || area[1] < 2 || area[3] > box.bottom - 1) continue;
      if (taken.some((t) => t[0] < area[2] && t[2] > area[0] && t[1] < area[3] && t[3] > area[1])) continue;
      taken.push(area);
      words.append(label_(cx + dx, cy + dy, name, { fill: front_.has(row) ? p.ink : p.quiet, 'font-weight': front_.has(row) ? 650 : 400 }));
      break;
    }
  }
  picture.append(words, ...dots);
  return picture;
}
