// Numbers of other evaluators, EVALUATOR/SUM: as they are, not in per cent. Only in pages whose records have them.
for (const c of EXTRA) if (c.id.includes('/')) c.show = (r) => general(column(c.id, r.i));
const numbersOfClbench = numbersTable;
function sumsTable(row) {
  const lines = EXTRA.filter((c) => c.id.includes('/') && has(column(c.id, row.i)));
  if (!lines.length) return null;
  const std = (c) => general(column(c.id.replace(/_mean$/, '_std'), row.i));
  return el('section', {}, el('h2', {}, 'Other evaluators'), el('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': 'Other evaluators' }, el('table', { class: 'bare' }, el('caption', { class: 'unseen' }, 'Sums of other evaluators, mean and standard deviation over seeds'),
    el('thead', {}, el('tr', {}, el('th', { scope: 'col' }, 'Name'), el('th', { scope: 'col', class: 'num' }, 'Mean'), el('th', { scope: 'col', class: 'num' }, 'Std'), el('th', { scope: 'col' }, 'Formula'))),
    el('tbody', {}, lines.map((c) => el('tr', {}, el('th', { scope: 'row' }, el('code', {}, c.name)), el('td', { class: 'num' }, general(column(c.id, row.i))), el('td', { class: 'num' }, std(c)), el('td', { class: 'quiet' }, D.about[c.hint] || '')))))));
}
numbersTable = (row, d) => [numbersOfClbench(row, d), sumsTable(row)];
