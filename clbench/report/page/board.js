// The opening: what this is, and for each stream the best contender with what cannot be told from it.
const MOST_CARDS = 12;
const LEAST = 5; // shared seeds: with fewer, that two rows are not told apart says little
const contenders = (rows) => rows.filter((r) => !r.reference && !r.legacy && has(r.mean));
const byStream = new Map();
for (const row of ROWS) {
  const place = D.stream[row.i];
  if (!byStream.has(place)) byStream.set(place, []);
  byStream.get(place).push(row);
}
const STREAMS = [...byStream.keys()].sort((a, b) => a - b).filter((place) => byStream.get(place).some((r) => has(r.mean)));
const best = (rows) => rows.find((r) => r.vs === 'best') || contenders(rows).sort((a, b) => b.mean - a.mean)[0];
const intervalText = (row) => (has(row.low) ? `${per(row.low)}\u2013${per(row.high)}` : '');

function opening() {
  const total = Object.values(D.counts).reduce((a, b) => a + b, 0);
  if (!total) {
    byId('about').append(el('p', { class: 'notice' }, 'No records yet. Run something, then make this page again: ', el('code', {}, 'clbench run'), ', ', el('code', {}, 'clbench report html'), '.'));
    return;
  }
  const done = D.counts.ok || 0;
  const others = Object.entries(D.counts).filter(([status]) => status !== 'ok').map(([status, n]) => `${n} ${status}`);
  if (!ROWS.length && D.losses.rows.length) {
    byId('about').append(el('p', { class: 'intro' }, `${plural(done, 'finished run')} of continual pre-training: a model learns one domain after another, and its loss on all of them is measured after each.`, others.length ? ` Without a result: ${others.join(', ')}.` : ''));
    return;
  }
  if (!ROWS.length && D.edits.rows.length) {
    byId('about').append(el('p', { class: 'intro' }, `${plural(done, 'finished run')} of model editing: facts of a language model are changed one after another, and old and new answers are asked on the way.`, others.length ? ` Without a result: ${others.join(', ')}.` : ''));
    return;
  }
  byId('about').append(el('p', { class: 'intro' },
    `${plural(ROWS.reduce((sum, r) => sum + r.n, 0), 'finished run')} of ${plural(new Set(ROWS.map((r) => r.learner)).size, 'learner')} on ${plural(D.streams.length, 'stream')}: experiences are learned one after another, and every test set seen so far is asked again after each. `,
    'Accuracy below is the mean over all sets after the last experience; intervals are 95 % bootstrap over seeds.',
    others.length ? ` Without a result: ${others.join(', ')}.` : ''));
  const cards = STREAMS.map(streamCard);
  byId('cards').append(...cards.slice(0, MOST_CARDS));
  if (cards.length > MOST_CARDS) {
    const more = el('button', { type: 'button', class: 'plain', onclick: () => { byId('cards').append(...cards.slice(MOST_CARDS)); more.remove(); } }, `Show ${plural(cards.length - MOST_CARDS, 'more stream')}`);
    byId('about').append(more);
  }
}

function named(rows, top, most = 6) {
  const shown = rows.slice(0, most).flatMap((row, k) => [k ? ', ' : '', link(row, briefly(label(row), 40)), `\u00a0(${signed(row.mean - top.mean)})`]);
  return rows.length > most ? [...shown, ` and ${rows.length - most} more`] : shown;
}

function streamCard(place) {
  const rows = byStream.get(place);
  const stream = D.streams[place];
  const top = best(rows);
  const node = el('article', { class: 'card' },
    el('h2', {}, el('bdi', { title: stream.scenario }, briefly(streamName(stream), 60))),
    el('p', { class: 'quiet' }, about(stream)));
  if (!top) {
    const old = rows.some((r) => has(r.mean) && r.legacy);
    node.append(el('p', {}, old ? 'Results of older code only (legacy): they are ranked and tested against nothing.' : 'No contender with a result.'));
    return node;
  }
  const of = (what) => rows.filter((r) => r.vs === what).sort((a, b) => b.mean - a.mean);
  const close = of('not distinguishable');
  const [same, early] = [close.filter((r) => r.shared >= LEAST), close.filter((r) => r.shared < LEAST)];
  const [unknown, level] = [of('too few seeds'), of('no spread')];
  node.append(
    el('p', { class: 'winner' }, link(top, briefly(top.learner, 40)), el('span', { class: 'big' }, per(top.mean), el('small', {}, '\u2009%'))),
    el('p', { class: 'facts' }, has(top.low) ? `95 % interval ${intervalText(top)} \u00b7 ` : 'no interval from one seed \u00b7 ', `${plural(top.n, 'seed')} \u00b7 ${duration(top.seconds)} \u00b7 ${bytes(top.held)} held`));
  if (same.length) node.append(el('p', {}, el('b', { class: 'mark same' }, 'Cannot be told'), ` from it after ${plural(Math.min(...same.map((r) => r.shared)), 'shared seed')} or more (points behind): `, named(same, top)));
  if (early.length) node.append(el('p', {}, el('b', { class: 'mark unknown' }, 'Undecided'), ` with ${plural(Math.max(...early.map((r) => r.shared)), 'shared seed')} at most; ${LEAST} are the least to say more (points behind): `, named(early, top)));
  if (unknown.length) node.append(el('p', {}, el('b', { class: 'mark unknown' }, 'Undecided'), ': fewer than two seeds are shared (points behind): ', named(unknown, top)));
  if (level.length) node.append(el('p', {}, el('b', { class: 'mark unknown' }, 'Undecided'), ': the same difference on every shared seed, and identical runs count once (points behind): ', named(level, top)));
  if (!close.length && !unknown.length && !level.length && contenders(rows).length > 1) node.append(el('p', {}, el('b', { class: 'mark better' }, 'Better'), ` than the ${contenders(rows).length - 1 === 1 ? 'other contender' : `other ${contenders(rows).length - 1} contenders`} on shared seeds.`));
  if (contenders(rows).length === 1) node.append(el('p', { class: 'quiet' }, 'The only contender on this stream.'));
  const reference = rows.filter((r) => r.reference && !r.legacy && has(r.mean));
  if (reference.length) node.append(el('p', { class: 'quiet' }, 'Reference, keeps all data: ', reference.slice(0, 3).flatMap((r, k) => [k ? ', ' : '', link(r), ` ${per(r.mean)} %`])));
  node.append(el('details', {}, el('summary', {}, 'Run the best one'), commandBox(D.commands[top.i])));
  return node;
}

function notInTable() {
  if (!D.lost.length && !D.problems.length) return;
  const lost = Object.entries(D.counts).filter(([k]) => k !== 'ok').reduce((sum, [, n]) => sum + n, 0);
  const list = byId('lost-list');
  if (D.lost.length) {
    list.append(el('h3', {}, plural(lost, 'run without a result', 'runs without a result')), el('ul', {}, D.lost.map(([status, id, scenario, learner, seed, why]) => el('li', {}, el('b', {}, status), ' ', el('code', {}, id), ' ', el('bdi', {}, scenario), ' ', el('bdi', {}, learner), ` seed ${seed}`, why ? [': ', el('bdi', {}, why)] : null))));
    if (lost > D.lost.length) list.append(el('p', { class: 'quiet' }, `and ${lost - D.lost.length} more`));
  }
  if (D.problems.length) {
    list.append(el('h3', {}, plural(D.num_problems, 'file that is no record', 'files that are no records')), el('ul', {}, D.problems.map((line) => el('li', {}, el('bdi', {}, line)))));
    if (D.num_problems > D.problems.length) list.append(el('p', { class: 'quiet' }, `and ${D.num_problems - D.problems.length} more`));
  }
  byId('lost').hidden = false;
}
