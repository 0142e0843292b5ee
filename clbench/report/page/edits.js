// Model editing: a table for each stream, and what holds over the number of edits. Shares are of all edits so far.
const EDITED = D.edits.rows.map((row, i) => ({ ...row, i, place: row.stream, stream: D.edits.streams[row.stream], n: row.runs.length, of: (name) => (row.numbers[name] || [null])[0], std: (name) => (row.numbers[name] || [null, null])[1] }));
const EDITSHARES = [['Score', 'edit_score'], ['Reliability', 'reliability'], ['Generalisation', 'generalisation'], ['Locality', 'locality'], ['Same subject', 'same_subject'], ['Newest', 'reliability_newest']];
const EDITSIZES = [['Old text', 'old_loss_rise'], ['Weight growth', 'weight_growth']];
const editCell = (show) => (name, key) => ({ name, hint: key, of: (r) => r.of(key), show: (r) => [key === 'edit_score' ? el('b', {}, show(r.of(key))) : show(r.of(key)), has(r.std(key)) ? el('small', { class: 'std' }, `\u00a0\u00b1\u00a0${show(r.std(key))}`) : null] });
const EDITCOLUMNS = [
  { name: 'Learner', of: (r) => r.label.toLowerCase(), word: true, show: (r) => el('bdi', { title: r.learner }, briefly(r.label, 32)) },
  ...EDITSHARES.map(([name, key]) => editCell((v) => per(v))(name, key)),
  ...EDITSIZES.map(([name, key]) => editCell((v) => fixed(v, 3))(name, key)),
  { name: 'Against best', of: (r) => ({ best: 0, 'not distinguishable': 1, 'too few seeds': 2, 'no spread': 2, worse: 3 }[r.vs] ?? null), show: (r) => verdictCell(r) },
  { name: 'Time', of: (r) => r.seconds, show: (r) => duration(r.seconds) },
  { name: 'Seeds', of: (r) => r.n, show: (r) => String(r.n) },
  { name: 'Model', of: (r) => r.model.toLowerCase(), word: true, show: (r) => el('bdi', { class: 'clip', title: r.model }, r.model) },
];

function editBoard() {
  if (!EDITED.length) return;
  byId('edits').hidden = false;
  byId('edits-nav').hidden = false;
  if (!ROWS.length) for (const id of ['board', 'cost']) byId(id).hidden = true;
  D.edits.streams.forEach((stream, place) => {
    const rows = EDITED.filter((r) => r.place === place);
    byId('edit-streams').append(
      el('article', {},
        el('div', { class: 'headline' }, el('h3', {}, el('bdi', {}, briefly(`${stream.scenario} \u00b7 ${stream.manifest}`, 60)))),
        el('p', { class: 'quiet' }, `${whole(stream.edits)} edits one after another; asked after ${stream.looks.map(whole).join(', ')}.`),
        sortedTable(rows, EDITCOLUMNS, 'Score', true, `Edits of ${stream.scenario}`),
        el('div', { class: 'figures' }, editFigure(rows, stream)),
        el('details', {}, el('summary', {}, 'Run the best one'), commandBox(rows[0].command))));
  });
}

const EDITPANELS = [...EDITSHARES.slice(1, 4).map(([name, key]) => [name, key, true]), ['Rise of the loss on old text, nats', 'old_loss_rise', false]];

// Four panels: reliability, generalisation, locality, loss on old text over the number of edits; a line for each learner.
function editFigure(rows, stream) {
  const drawn = rows.filter((r) => r.course.length);
  if (!drawn.length) return null;
  const names = EDITPANELS.map(([, key]) => key);
  return figure({
    title: 'After so many edits',
    note: 'Means over seeds, of all edits so far. What falls to the right is forgotten; a rise on old text is damage beside the edits.',
    wide: true,
    name: () => fileName('edits', stream.scenario),
    table: () => [['learner', 'edits', ...names], ...drawn.flatMap((r) => r.course.map((c) => [r.label, c.edits, ...names.map((k) => tableValue(c[k]))]))],
    draw: (p, width) => {
      const columns = width > 640 ? 2 : 1;
      const wide = width / columns;
      const tall = 250;
      const lines = Math.ceil(drawn.length / Math.max(1, Math.floor(width / 150)));
      const picture = canvas(width, tall * Math.ceil(EDITPANELS.length / columns) + 20 * lines + 8, p);
      const ink = (k) => p.series[k % p.series.length];
      const dash = (k) => (k >= p.series.length ? '4 3' : null);
      const high = Math.max(2, stream.edits);
      EDITPANELS.forEach(([name, key, share], place) => {
        const [x0, y0] = [(place % columns) * wide, Math.floor(place / columns) * tall];
        const box = { left: x0 + 46, right: x0 + wide - 16, top: y0 + 26, bottom: y0 + tall - 44 };
        const values = drawn.flatMap((r) => r.course.map((c) => c[key])).filter(has);
        const y = share ? shareAxis([0, 1], '') : plainAxis([0, ...values], '', (v) => String(Number(v.toPrecision(3))).replace('-', MINUS));
        const { px, py } = axes(picture, p, box, { low: 1, high, log: true, ticks: logTicks(1, high), show: general, name: 'edits' }, y);
        picture.append(label_(box.left, y0 + 14, share ? `${name}, per cent` : name, { 'font-weight': 600 }));
        drawn.forEach((r, k) => {
          const points = r.course.map((c) => [c.edits, c[key]]);
          picture.append(titled(svg('path', { d: path(points, px, py), fill: 'none', stroke: ink(k), 'stroke-width': 1.7, 'stroke-dasharray': dash(k) }), r.label));
          for (const [x, v] of points) if (has(v)) picture.append(titled(svg('circle', { cx: px(x), cy: py(v), r: 2.4, fill: ink(k) }), `${r.label}, ${whole(x)} edits: ${share ? per(v) : fixed(v, 3)}`));
        });
      });
      const foot = tall * Math.ceil(EDITPANELS.length / columns);
      const many = Math.max(1, Math.floor(width / 150));
      drawn.forEach((r, k) => {
        const [x, y] = [(k % many) * (width / many) + 4, foot + 20 * Math.floor(k / many) + 10];
        picture.append(svg('line', { x1: x, x2: x + 18, y1: y - 4, y2: y - 4, stroke: ink(k), 'stroke-width': 2, 'stroke-dasharray': dash(k) }), label_(x + 24, y, briefly(r.label, 17)));
      });
      return picture;
    },
  }).node;
}
