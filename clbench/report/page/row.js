// Everything about one row: numbers, command, figures, runs, settings.
const fact = (name, value, note) => value !== NONE && el('div', {}, el('dt', {}, name), el('dd', {}, el('b', {}, value), note ? el('small', {}, note) : null));

function showRow(row) {
  const main = byId('row');
  const d = D.details[row.i] || {};
  const rivals = byStream.get(D.stream[row.i]);
  const top = best(rivals);
  const pm = (name, digits) => (has(column(`${name}_std`, row.i)) ? `\u00b1 ${per(column(`${name}_std`, row.i), digits)} over seeds` : '');
  const verdict = row.reference ? 'A reference: it keeps all data and is no contender.' : row.legacy ? 'Legacy: numbers of other code, compared with nothing.' : {
    best: 'The best mean on its stream among contenders.',
    'not distinguishable': [row.shared < LEAST ? 'Undecided against the best, ' : 'Cannot be told from the best, ', top ? link(top, label(top)) : '', `, on ${plural(row.shared, 'shared seed')} (p = ${pvalue(row.p)}, paired t-test, Holm).`],
    worse: ['Worse than the best, ', top ? link(top, label(top)) : '', `, on shared seeds (p = ${pvalue(row.p)}, paired t-test, Holm).`],
    'too few seeds': ['Undecided against the best, ', top ? link(top, label(top)) : '', ': fewer than two seeds are shared.'],
    'no spread': ['Undecided against the best, ', top ? link(top, label(top)) : '', ': the difference is the same on every shared seed, and identical runs count once.'],
  }[row.vs] || 'No result to compare.';
  main.replaceChildren(
    el('p', { class: 'back' }, el('a', { href: '#' }, '\u2190 All rows')),
    el('div', { class: 'headline' }, el('h1', { title: row.learner }, el('bdi', {}, briefly(row.learner, 90))), el('div', { class: 'tools' }, top && top !== row ? el('a', { class: 'button', href: versusHash(row, top) }, 'Compare with the best') : null, el('a', { class: 'button', href: versusHash(row) }, top && top !== row ? 'with another' : 'Compare'))),
    el('p', { class: 'chips' }, [['scenario', row.scenario], ['model', row.model], ['variant', row.variant], ['manifest', row.manifest], ['marks', row.marks]].filter(([, v]) => v).map(([k, v]) => el('span', {}, el('small', {}, k), ' ', el('bdi', {}, v)))),
    el('p', { class: 'quiet' }, about(row.stream), row.differs ? [' \u00b7 differs from other rows of this learner in ', el('bdi', {}, row.differs)] : null),
    ...(row.stream.brings ? [el('details', { class: 'settings' }, el('summary', {}, 'Classes of each experience'), el('ol', {}, row.stream.brings.map((text) => el('li', {}, el('bdi', {}, text)))))] : []),
    el('dl', { class: 'factsheet' },
      fact('Last accuracy', has(row.mean) ? `${per(row.mean)}\u2009%` : NONE, has(row.low) ? `95 % interval ${intervalText(row)}${row.n < 5 ? ', too narrow below 5 seeds' : ''}` : 'no interval from one seed'),
      fact('Rank on its stream', ranks(row), row.rank && row.rank[0] !== row.rank[1] ? 'tied with others, or not yet told apart' : ''),
      row.orders ? fact(`Worst of ${row.orders} class orders`, `${per(order('worst', row))}\u2009%`, `${has(order('worst_low', row)) ? `95 % interval ${range(order('worst_low', row), order('worst_high', row))} \u00b7 ` : ''}mean over orders ${per(order('mean', row))}`) : null,
      fact('Average over experiences', has(column('step_macro_mean', row.i)) ? `${per(column('step_macro_mean', row.i))}\u2009%` : NONE, pm('step_macro')),
      fact('Forgetting', per(column('forgetting_mean', row.i)), pm('forgetting')),
      fact('Time', duration(row.seconds), row.n ? `mean of ${plural(row.n, 'run')}` : ''),
      fact('Bytes held', bytes(row.held), column('exemplars', row.i) ? `${plural(column('exemplars', row.i), 'exemplar')} among them` : 'no exemplars'),
      fact('Peak memory', has(row.memory) ? bytes(row.memory * 1e6) : NONE),
      fact('Parameters trained', amount(column('parameters_trained', row.i)), has(column('parameters_total', row.i)) ? `of ${amount(column('parameters_total', row.i))} in the model` : '')),
    el('p', { class: 'verdict' }, verdict),
    el('section', {}, el('h2', {}, 'Run it'), commandBox(D.commands[row.i])),
  );
  const figures = el('div', { class: 'figures' }, rowFigures(row, d));
  if (!d.all) figures.prepend(el('p', { class: 'notice' }, d.matrix ? 'To keep this page small, single seeds of this row were left out; the records hold them.' : d.curve ? 'To keep this page small, the matrix of this row was left out; its records hold it.' : row.n ? 'This row has no accuracy matrix, or it was left out to keep this page small; its records hold everything.' : 'No finished run: nothing to draw.'));
  main.append(figures, el('div', { class: 'columns' }, rowRuns(row), numbersTable(row, d), sumsTable(row)), settingsTable(d));
}

// The figures of a row that its details have numbers for.
function rowFigures(row, d) {
  const names = { sets: row.stream.sets, seeds: d.seeds };
  const table = (kind, own) => ({ table: unfold(kind, d[kind][0], { ...names, ...own }), edges: (d[kind][1] || []).map((x) => ({ x })), floors: [] });
  const name = (word) => () => fileName(row.scenario, row.learner, row.key, word);
  const one = (kind, title, note, more = {}) => d[kind] && figure({ kind, title, note, name: name(kind), sets: () => table(kind), ...more }).node;
  const seeds = d.seeds && d.seeds.length > 1;
  const words = d.loss ? d.loss[3] : {};
  return [
    one('matrix', 'Accuracy after each experience', `Per cent right on each test set, mean of ${plural(row.n, 'seed')}.`),
    one('curve', 'Accuracy over experiences', `Mean over the sets seen${seeds ? ', and over seeds; shaded from the lowest to the highest' : ''}.`, { sets: () => ({ table: labelled(table('curve').table, row.learner) }) }),
    one('forgotten', 'Forgetting of each set', `Best accuracy since its own experience and before the last, minus the last; in points. ${seeds ? 'Rings: seeds. ' : ''}The newest sets have nothing to forget yet.`, { sets: () => { const made = table('forgotten'); return { ...made, table: made.table.filter((r) => has(r.lost)) }; } }),
    one('stability', 'Accuracy inside experiences', d.stability ? `Seed ${d.stability[3].seed}: every evaluation while learning. Dotted: where an experience begins. A dip of old sets right after it is the stability gap.` : ''),
    one('loss', d.loss && d.loss[0].lr ? 'Training loss and learning rate' : 'Training loss', 'A line for each seed. Dotted: where an experience ends.', { words, sets: () => table('loss', { seeds: words.seeds }) }),
    one('seconds', 'Where the seconds went', `Mean of ${plural(row.n, 'run')}: ${duration(row.seconds)} in all.`, { sets: () => ({ table: labelled(table('seconds').table, row.learner) }) }),
  ];
}

const rowRuns = (row) => runsTable(['Last', 'Average', 'Forgetting', 'Time', 'Memory'], row.runs.map((r) => [r.seed, r.id, per(r.last, 2), per(r.step, 2), per(r.forgetting, 2), duration(r.seconds), has(r.memory) ? bytes(r.memory * 1e6) : NONE]));

function numbersTable(row, d) {
  const lines = (d.v || []).map(([mean, std], k) => [D.names[k], mean, std]).filter(([, mean]) => has(mean));
  if (!lines.length) return null;
  const form = (name, v) => (!has(v) ? NONE : /nll|brier/.test(name) ? fixed(v, 4) : per(v, 2));
  return formulasTable('Every number', 'Every number of this row, mean and standard deviation over seeds', lines.map(([name, mean, std]) => [name, form(name, mean), form(name, std), D.formulas[name] || '']));
}

// Numbers of other evaluators, EVALUATOR/SUM: as they are, not in per cent.
function sumsTable(row) {
  const lines = EXTRA.filter((c) => c.id.includes('/') && has(column(c.id, row.i)));
  if (!lines.length) return null;
  const std = (c) => general(column(c.id.replace(/_mean$/, '_std'), row.i));
  return formulasTable('Other evaluators', 'Sums of other evaluators, mean and standard deviation over seeds', lines.map((c) => [c.name, general(column(c.id, row.i)), std(c), D.about[c.hint] || '']));
}

function settingsTable(d) {
  if (!d.s) return null;
  return el('details', { class: 'settings' }, el('summary', {}, `All settings (${d.s.length})`), el('ul', {}, d.s.map((k) => el('li', {}, el('code', {}, D.pool[k])))));
}
