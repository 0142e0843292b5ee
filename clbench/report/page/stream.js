// What one stream shows: its leaderboard as a figure, what was forgotten, and cost against accuracy.
const COST_WORDS = { cost_seconds: 'time of a run', cost_held: 'bytes held at the end', cost_memory: 'peak memory', cost_trained: 'parameters trained' };

function streamFigures() {
  const places = STREAMS.filter((place) => D.shown[place] && D.shown[place].leaderboard);
  if (!places.length) { for (const id of ['stream', 'cost', 'stream-nav', 'cost-nav']) byId(id).hidden = true; return; }
  const largest = places.reduce((a, b) => (byStream.get(b).length > byStream.get(a).length ? b : a));
  const state = { place: largest, cost: Object.keys(COST_WORDS).find((kind) => places.some((place) => D.shown[place][kind])) };
  const shown = (kind) => { const found = D.shown[state.place][kind]; return found ? { table: rowsOf(found) } : null; };
  const file = (word) => () => fileName(word, D.streams[state.place].scenario, D.streams[state.place].manifest);
  const choice = (id, words) => {
    const list = el('select', { id, onchange: () => choose_(Number(list.value)) }, places.map((place) => el('option', { value: place, selected: place === largest }, briefly(streamName(D.streams[place]), 50))));
    return [el('label', { for: id }, words), list];
  };
  const more = byStream.get(largest).length > 40 ? 'The first 40 rows. ' : '';
  const board_ = figure({ kind: 'leaderboard', title: 'Last accuracy with its interval', note: `${more}Ticks: runs. Line: 95 % bootstrap interval of the mean.`, name: file('leaderboard'), sets: () => shown('leaderboard') });
  const lost = figure({ kind: 'forgetting', title: 'What was forgotten', note: `${more}Points lost on each set since the best, mean over seeds.`, name: file('forgetting'), sets: () => shown('forgetting') });
  const costs = Object.keys(COST_WORDS).filter((kind) => places.some((place) => D.shown[place][kind]));
  const pick = el('select', { id: 'scatter-cost', onchange: () => { state.cost = pick.value; cost.redraw(state.cost); } }, costs.map((kind) => el('option', { value: kind }, COST_WORDS[kind])));
  const cost = figure({ kind: state.cost || 'cost_seconds', title: 'Cost against last accuracy', wide: true, note: 'Stairs: the Pareto front, contenders that no other beats at their cost. Squares: references and legacy rows. Bars: 95 % intervals.', name: () => file(state.cost)(), sets: () => shown(state.cost), controls: el('div', { class: 'controls' }, choice('scatter-stream', 'Stream '), el('label', { for: 'scatter-cost' }, 'Cost '), pick) });
  function choose_(place) {
    state.place = place;
    for (const id of ['stream-stream', 'scatter-stream']) byId(id).value = String(place);
    for (const one of [board_, lost, cost]) one.redraw();
  }
  byId('stream-tools').append(...choice('stream-stream', 'Stream '));
  byId('stream-figures').append(board_.node, lost.node);
  byId('scatter').append(cost.node);
}
