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
        el('div', { class: 'figures' }, editFigure(stream)),
        el('details', {}, el('summary', {}, 'Run the best one'), commandBox(rows[0].command))));
  });
}

// Reliability, generalisation, locality, loss on old text over the number of edits; a line for each learner.
function editFigure(stream) {
  if (!stream.shown.edits) return null;
  return figure({ kind: 'edits', title: 'After so many edits', note: 'Means over seeds with their range, of all edits so far. What falls to the right is forgotten; a rise on old text is damage beside the edits.', wide: true, name: () => fileName('edits', stream.scenario), sets: () => ({ table: rowsOf(stream.shown.edits) }) }).node;
}
