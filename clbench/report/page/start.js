// Which part is shown (by the fragment), the theme, the size of the window, the printer.
const TITLE = document.title;
let wasAt = 0;
let first = true;

function route() {
  let hash = location.hash.slice(1);
  const [name, value] = hash.split(/=(.*)/s);
  let keys = [];
  try { keys = (value || '').split(',').map(decodeURIComponent); } catch { keys = []; }
  const rows = keys.map((key) => KEYS.get(key));
  let shown = 'home';
  const loss = name === 'loss' ? PREKEYS.get(keys[0]) : null;
  if ((name === 'row' && rows[0]) || loss) shown = 'row';
  if ((name === 'compare' || hash === 'compare') && ROWS.some((r) => r.n)) shown = 'versus';
  if (!byId('home').hidden && shown !== 'home') wasAt = window.scrollY;
  const back = byId('home').hidden && shown === 'home';
  for (const id of ['home', 'row', 'versus']) byId(id).hidden = id !== shown;
  document.title = TITLE;
  if (shown === 'row') {
    if (loss) showLoss(loss); else showRow(rows[0]);
    document.title = `${briefly(loss ? loss.label : rows[0].learner, 60)} \u00b7 ${TITLE}`;
  } else if (shown === 'versus') {
    const a = rows[0] || defaults()[0];
    const b = rows[1] || [...defaults(D.stream[a.i])].find((r) => r !== a) || a;
    showVersus(a, b);
    document.title = `${briefly(a.learner, 40)} and ${briefly(b.learner, 40)} \u00b7 ${TITLE}`;
  }
  tray();
  if (shown !== 'home') { window.scrollTo(0, 0); if (!first) byId(shown).focus({ preventScroll: true }); } else if (back && !hash) { byId('home').focus({ preventScroll: true }); window.scrollTo(0, wasAt); } else if (byId(hash) && byId('home').contains(byId(hash))) { byId(hash).scrollIntoView(); byId(hash).focus({ preventScroll: true }); }
  if ((name === 'row' && !rows[0]) || (name === 'loss' && !loss)) say('No row has this name; the leaderboard is shown.');
  first = false;
  requestAnimationFrame(() => redrawAll(false));
}
// What to compare when nothing is chosen: the two best of the largest stream.
function defaults(place) {
  const at = place ?? STREAMS.reduce((x, y) => (byStream.get(y).length > byStream.get(x).length ? y : x), STREAMS[0] ?? D.stream[ROWS.findIndex((r) => r.n)]);
  const rows = byStream.get(at).filter((r) => r.n);
  const good = contenders(rows).sort((x, y) => y.mean - x.mean);
  return good.length ? [...good, ...rows.filter((r) => !good.includes(r))] : rows;
}

const dark = matchMedia('(prefers-color-scheme: dark)');
const remembered = () => { try { return localStorage.getItem('clbench-theme'); } catch { return null; } };
function setTheme(name, keep) {
  theme = name;
  document.documentElement.dataset.theme = name;
  const other = name === 'dark' ? 'light' : 'dark';
  byId('theme').textContent = other === 'dark' ? 'Dark' : 'Light';
  byId('theme').setAttribute('aria-label', `Switch to the ${other} theme`);
  if (keep) { try { localStorage.setItem('clbench-theme', name); } catch { /* not kept, then */ } }
  redrawAll(true);
}
byId('theme').addEventListener('click', () => setTheme(theme === 'dark' ? 'light' : 'dark', true));
dark.addEventListener('change', () => { if (!remembered()) setTheme(dark.matches ? 'dark' : 'light'); });

const preferred = () => remembered() || (dark.matches ? 'dark' : 'light');
window.addEventListener('beforeprint', () => setTheme('light'));
window.addEventListener('afterprint', () => setTheme(preferred()));
let timer = 0;
window.addEventListener('resize', () => { clearTimeout(timer); timer = setTimeout(() => redrawAll(false), 120); });
window.addEventListener('hashchange', route);
document.addEventListener('click', (event) => { for (const menu of document.querySelectorAll('details.choose[open]')) if (!menu.contains(event.target)) menu.open = false; });
document.addEventListener('keydown', (event) => { if (event.key === 'Escape') for (const menu of document.querySelectorAll('details.choose[open]')) { menu.open = false; menu.querySelector('summary').focus(); } });

setTheme(preferred());
opening();
board();
streamFigures();
acrossStreams();
changed();
preBoard();
editBoard();
notInTable();
byId('foot').append(`Made by clbench report html${D.newest ? ` from records up to ${D.newest}` : ''}. One file: it asks the network for nothing. `,
  D.left.slice(1).some(Boolean) ? `To keep it small, details were thinned out: single seeds of ${plural(D.left[1] + D.left[2], 'row')}, matrices of ${plural(D.left[3], 'row')}, everything but the table for ${plural(D.left[4], 'row')}. ` : '',
  'Intervals: 95 % bootstrap over seeds, too narrow below five of them; with several class orders see clbench report statistics.');
route();
document.documentElement.dataset.ready = 'yes';
