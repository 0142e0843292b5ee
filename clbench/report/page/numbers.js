// Statistics of two learners on shared seeds: the paired t-test of `clbench report compare`, with its t interval.
// Two-sided tail of Student's t for a whole number of degrees of freedom: its finite sums (Abramowitz & Stegun 26.7.3, 26.7.4).
function tTail(t, df) {
  const odd = df % 2 === 1;
  const angle = Math.atan(Math.abs(t) / Math.sqrt(df));
  let sum = 0;
  let term = odd ? Math.cos(angle) : 1;
  for (let k = odd ? 3 : 2; k <= df; k += 2) { sum += term; term *= (Math.cos(angle) ** 2 * (k - 1)) / k; }
  return Math.max(0, 1 - (odd ? (2 / Math.PI) * (angle + Math.sin(angle) * sum) : Math.sin(angle) * sum));
}
function tQuantile(df, tail = 0.05) {
  let low = 0;
  let high = 1;
  while (tTail(high, df) > tail) high *= 2;
  for (let i = 0; i < 80; i += 1) { const middle = (low + high) / 2; if (tTail(middle, df) > tail) low = middle; else high = middle; }
  return (low + high) / 2;
}
const average = (values) => { const known = values.filter(has); return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null; };
function spread(values) {
  const known = values.filter(has);
  if (known.length < 2) return null;
  const mean = average(known);
  return Math.sqrt(known.reduce((sum, v) => sum + (v - mean) ** 2, 0) / (known.length - 1));
}
// Differences -> mean, 95 % t interval, two-sided p; without any spread nothing can be tested: p is 1 for zero and null otherwise.
function paired(differences) {
  const n = differences.length;
  const mean = average(differences);
  if (n < 2) return { n, mean, low: null, high: null, p: null };
  const std = spread(differences);
  if (std <= 1e-12 * Math.max(1, Math.abs(mean))) return { n, mean, low: null, high: null, p: Math.abs(mean) <= 1e-12 ? 1 : null, level: true };
  const error = std / Math.sqrt(n);
  const half = tQuantile(n - 1) * error;
  return { n, mean, low: mean - half, high: mean + half, p: tTail(mean / error, n - 1) };
}

// --- matrices ------------------------------------------------------------------------------------------------------
// A run's accuracies [T][E] (null where not evaluated) from its counts.
const fractions = (run) => run.c.map((line) => run.n.map((size, j) => (has(line[j]) ? line[j] / size : null)));
function meanMatrix(matrices) {
  const first = matrices[0];
  const alike = matrices.filter((m) => m.length === first.length && m[0].length === first[0].length);
  return first.map((line, i) => line.map((_, j) => average(alike.map((m) => m[i][j]))));
}
// Mean over the sets seen after each experience, each set with equal weight.
const macro = (matrix, first) => matrix.map((line, i) => {
  const seen = line.filter((_, j) => first[j] <= i);
  return seen.length && seen.every(has) ? average(seen) : null;
});
// Per set: best since its own experience and before the last, minus the last.
const forgotten = (matrix, first) => matrix[0].map((_, j) => {
  const last = matrix.length - 1;
  if (first[j] >= last) return null;
  const before = matrix.slice(first[j], last).map((line) => line[j]).filter(has);
  return before.length && has(matrix[last][j]) ? Math.max(...before) - matrix[last][j] : null;
});
// What the page has of a row: matrices by seed, their mean, curves.
function detail(row) {
  const d = D.details[row.i] || {};
  const first = row.stream.first;
  const made = { lower: Boolean(d.low), first, runs: [], mean: null, curve: null, values: d.v || null, settings: d.s || null, poor: !d.r };
  if (d.r) {
    made.runs = d.r.map((run, k) => ({ seed: row.runs[k].seed, id: row.runs[k].id, matrix: run.c.length ? fractions(run) : null, loss: run.l, trace: run.t }));
    const matrices = made.runs.map((run) => run.matrix).filter((m) => m && m[0].length === first.length);
    if (matrices.length) made.mean = meanMatrix(matrices);
  } else if (d.m) {
    made.mean = d.m.map((line) => line.map((v) => (has(v) ? v / (d.low ? 1 : 1000) : null)));
    if (d.f) made.runs = [{ seed: row.runs[d.f[0]].seed, id: row.runs[d.f[0]].id, matrix: null, loss: d.f[1], trace: d.f[2] }];
  } else if (d.k) {
    made.curve = d.k.map((v) => (has(v) ? v / (d.low ? 1 : 1000) : null));
  }
  if (made.mean) made.curve = macro(made.mean, first);
  for (const run of made.runs) run.curve = run.matrix ? macro(run.matrix, first) : null;
  return made;
}
