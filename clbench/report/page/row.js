// Everything about one row: numbers, command, figures, runs, settings.
const fact = (name, value, note) => value !== NONE && el('div', {}, el('dt', {}, name), el('dd', {}, el('b', {}, value), note ? el('small', {}, note) : null));

function showRow(row) {
  const main = byId('row');
  const d = detail(row);
  const rivals = byStream.get(D.stream[row.i]);
  const top = best(rivals);
  const pm = (name, digits) => (has(column(`${name}_std`, row.i)) ? `\u00b1 ${per(column(`${name}_std`, row.i), digits)} over seeds` : '');
  const verdict = row.reference ? 'A reference: it keeps all data and is no contender.' : row.legacy ? 'Legacy: numbers of other code, compared with nothing.' : {
    best: 'The best mean on its stream among contenders.',
    'not distinguishable': ['Not distinguishable from the best, ', top ? link(top, label(top)) : '', `, on shared seeds (p = ${pvalue(row.p)}, paired t-test, Holm).`],
    worse: ['Worse than the best, ', top ? link(top, label(top)) : '', `, on shared seeds (p = ${pvalue(row.p)}, paired t-test, Holm).`],
    'too few seeds': ['Cannot be told from the best, ', top ? link(top, label(top)) : '', ': fewer than two seeds are shared.'],
    'no spread': ['Cannot be told from the best, ', top ? link(top, label(top)) : '', ': the difference is the same on every shared seed, and identical runs count once.'],
  }[row.vs] || 'No result to compare.';
  main.replaceChildren(
    el('p', { class: 'back' }, el('a', { href: '#' }, '\u2190 All rows')),
    el('div', { class: 'headline' }, el('h1', { title: row.learner }, el('bdi', {}, briefly(row.learner, 90))), el('div', { class: 'tools' }, top && top !== row ? el('a', { class: 'button', href: versusHash(row, top) }, 'Compare with the best') : null, el('a', { class: 'button', href: versusHash(row) }, top && top !== row ? 'with another' : 'Compare'))),
    el('p', { class: 'chips' }, [['scenario', row.scenario], ['model', row.model], ['variant', row.variant], ['manifest', row.manifest], ['marks', row.marks]].filter(([, v]) => v).map(([k, v]) => el('span', {}, el('small', {}, k), ' ', el('bdi', {}, v)))),
    el('p', { class: 'quiet' }, about(row.stream), row.differs ? [' \u00b7 differs from other rows of this learner in ', el('bdi', {}, row.differs)] : null),
    ...(row.stream.brings ? [el('details', { class: 'settings' }, el('summary', {}, 'Classes of each experience'), el('ol', {}, row.stream.brings.map((text) => el('li', {}, el('bdi', {}, text)))))] : []),
    el('dl', { class: 'factsheet' },
      fact('Last accuracy', has(row.mean) ? `${per(row.mean)}\u2009%` : NONE, has(row.low) ? `95 % interval ${intervalText(row)}${row.n < 5 ? ', too narrow below 5 seeds' : ''}` : 'no interval from one seed'),
      fact('Average over experiences', has(column('step_macro_mean', row.i)) ? `${per(column('step_macro_mean', row.i))}\u2009%` : NONE, pm('step_macro')),
      fact('Forgetting', per(column('forgetting_mean', row.i)), pm('forgetting')),
      fact('Time', duration(row.seconds), row.n ? `mean of ${plural(row.n, 'run')}` : ''),
      fact('Bytes held', bytes(row.held), column('exemplars', row.i) ? `${plural(column('exemplars', row.i), 'exemplar')} among them` : 'no exemplars'),
      fact('Peak memory', has(row.memory) ? bytes(row.memory * 1e6) : NONE),
      fact('Parameters trained', amount(column('parameters_trained', row.i)), has(column('parameters_total', row.i)) ? `of ${amount(column('parameters_total', row.i))} in the model` : '')),
    el('p', { class: 'verdict' }, verdict),
    el('section', {}, el('h2', {}, 'Run it'), commandBox(D.commands[row.i])),
  );
  const figures = el('div', { class: 'figures' });
  if (d.mean) figures.append(heatFigure(row, d));
  if (d.curve) figures.append(curveFigure(row, d));
  for (const made of [d.mean && !d.lower ? forgettingFigure(row, d) : null, stabilityFigure(row, d), lossFigure(row, d), phaseFigure(row)]) if (made) figures.append(made);
  if (d.poor) figures.prepend(el('p', { class: 'notice' }, d.mean ? 'To keep this page small, single seeds of this row were left out; the records hold them.' : d.curve ? 'To keep this page small, the matrix of this row was left out; its records hold it.' : row.n ? 'This row has no accuracy matrix, or it was left out to keep this page small; its records hold everything.' : 'No finished run: nothing to draw.'));
  main.append(figures, el('div', { class: 'columns' }, rowRuns(row), numbersTable(row, d)), settingsTable(d));
}

const rowRuns = (row) => runsTable(['Last', 'Average', 'Forgetting', 'Time', 'Memory'], row.runs.map((r) => [r.seed, r.id, per(r.last, 2), per(r.step, 2), per(r.forgetting, 2), duration(r.seconds), has(r.memory) ? bytes(r.memory * 1e6) : NONE]));

function numbersTable(row, d) {
  const lines = (d.values || []).map(([mean, std], k) => [D.names[k], mean, std]).filter(([, mean]) => has(mean));
  if (!lines.length) return null;
  const form = (name, v) => (!has(v) ? NONE : /nll|brier/.test(name) || d.lower ? fixed(v, 4) : per(v, 2));
  return formulasTable('Every number', 'Every number of this row, mean and standard deviation over seeds', lines.map(([name, mean, std]) => [name, form(name, mean), form(name, std), D.formulas[name] || '']));
}

function settingsTable(d) {
  if (!d.settings) return null;
  return el('details', { class: 'settings' }, el('summary', {}, `All settings (${d.settings.length})`), el('ul', {}, d.settings.map((k) => el('li', {}, el('code', {}, D.pool[k])))));
}
