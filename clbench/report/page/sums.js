// Numbers of other evaluators, EVALUATOR/SUM: as they are, not in per cent. Only in pages whose records have them.
for (const c of EXTRA) if (c.id.includes('/')) c.show = (r) => general(column(c.id, r.i));
const numbersOfClbench = numbersTable;
function sumsTable(row) {
  const lines = EXTRA.filter((c) => c.id.includes('/') && has(column(c.id, row.i)));
  if (!lines.length) return null;
  const std = (c) => general(column(c.id.replace(/_mean$/, '_std'), row.i));
  return formulasTable('Other evaluators', 'Sums of other evaluators, mean and standard deviation over seeds', lines.map((c) => [c.name, general(column(c.id, row.i)), std(c), D.about[c.hint] || '']));
}
numbersTable = (row, d) => [numbersOfClbench(row, d), sumsTable(row)];
