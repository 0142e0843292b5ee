// Answers across streams: win rates, class orders, what changed since the last version.
function acrossStreams() {
  const parts = byId('across-parts');
  if (D.wins.length) {
    const several = new Set(D.wins.map((w) => w.model)).size > 1;
    const table = D.wins.slice(0, 40).map((w) => ({ label: several ? `${w.learner} ${w.model}` : w.learner, streams: w.streams, rate: 100 * w.rate, lowest: 100 * w.lowest, highest: 100 * w.highest }));
    parts.append(el('div', { class: 'figures' }, figure({ kind: 'wins', title: 'Win rates', wide: true, name: () => 'win_rates', sets: () => ({ table }),
      note: 'Share of the other contenders of a stream that a learner is ahead of by its mean, each stream with equal weight; line: from its lowest to its highest stream. Learners ran on different streams and met different others: hover for how many.' }).node));
  }
  const seen = new Set();
  const rows = ROWS.filter((r) => r.orders && !r.legacy && !seen.has(orderKey(r)) && seen.add(orderKey(r)));
  if (rows.length) {
    rows.sort((a, b) => (a.scenario < b.scenario ? -1 : a.scenario > b.scenario ? 1 : order('mean', b) - order('mean', a)));
    parts.append(simpleTable('Class orders', ['Learner', 'Scenario', 'Orders', 'Mean', '95 % over orders', 'Worst order', '95 % of it', 'Manifest'], rows.map((r) => [link(r, briefly(label(r), 40)), el('bdi', {}, briefly(r.scenario, 40)), String(r.orders), per(order('mean', r)), range(order('low', r), order('high', r)), el('b', {}, per(order('worst', r))), range(order('worst_low', r), order('worst_high', r)), column('worst_order', r.i)])),
      el('p', { class: 'quiet' }, 'Rows whose settings ran on several class orders. Mean and its t interval: over the means of the orders. Worst: the lowest mean of an order, with the bootstrap interval over its seeds.'));
  }
  byId('across').hidden = byId('across-nav').hidden = !parts.childElementCount;
}
const order = (name, row) => column(`order_${name}`, row.i);
const orderKey = (r) => [r.scenario, r.learner, r.model, r.orders, order('mean', r)].join('\n');
const range = (low, high) => (has(low) ? `${per(low)}\u2013${per(high)}` : NONE);

const CHANGED = { moved: 'Other mean', seeds: 'Other seeds, the same mean', new: 'New', gone: 'Gone' };
function changed() {
  if (!D.changes) return;
  byId('changed').hidden = false;
  const list = byId('changed-list');
  if (!D.changes.length) { list.append(el('p', {}, 'Nothing: the same rows with the same means and seeds.')); return; }
  list.append(el('p', { class: 'quiet' }, Object.entries(CHANGED).map(([what, words]) => [words, D.changes.filter((c) => c[0] === what).length]).filter(([, n]) => n).map(([words, n]) => `${words}: ${plural(n, 'row')}`).join('. '), '.'));
  list.append(simpleTable('Rows that changed', ['Learner', 'What', 'Scenario', 'Model', 'Variant', 'Before', 'Now', 'Difference', 'Seeds'], D.changes.slice(0, 500).map(([what, scenario, learner, model, variant, , before, now, had, have]) => [el('bdi', {}, briefly(learner, 40)), CHANGED[what], el('bdi', {}, briefly(scenario, 40)), el('bdi', {}, briefly(model, 30)), el('code', {}, variant), per(before), per(now), has(before) && has(now) ? signed(now - before) : NONE, had === have ? String(have) : `${had ?? NONE} \u2192 ${have ?? NONE}`])));
}
