
// Asks the agent every few seconds, shows what it says, and says so when it does not answer.

const EVERY = 3000;
const PATIENCE = 5000;

let last = null;

/** The one sentence that a reader takes away. */
function verdict({ edges, conditions, mesh }) {
  const of = (protection) => edges.filter((edge) => edge.protection === protection && !refusedOnly(edge));
  const [plain, outside] = [of('plaintext'), of('outside')];
  const carried = edges.filter((edge) => !refusedOnly(edge)).length;
  const targets = (list) => new Set(list.map((edge) => key(edge.destination, 'to'))).size;
  const accepting = `${many(targets(plain), 'workload')} of this node ${plural(targets(plain), 'accepts', 'accept')} plaintext`;
  const missing = conditions.filter((condition) => condition.missing);
  if (missing.length) {
    const why = missing.map((condition) => `${condition.name}: ${condition.missing}`).join('; ');
    return ['warn', 'The agent is not ready', plain.length ? `${why}. ${accepting}.` : why];
  }
  if (mesh && !mesh.valid) {
    return ['warn', 'The newest configuration is not in force', 'It was refused, and the one before it stays. `mtls status` names the file and the reason.'];
  }
  if (plain.length) {
    const opened = plain.reduce((sum, edge) => sum + edge.opened, 0);
    return ['bad', accepting, `${many(opened, 'connection')} so far, which STRICT mode would refuse.`];
  }
  if (!carried) return ['none', 'Nothing to protect yet', 'No connection has been carried or accepted since the agent started.'];
  const away = outside.length ? ` ${many(outside.length, 'pair')} ${plural(outside.length, 'leaves', 'leave')} the mesh.` : '';
  return ['good', 'Everything inside the mesh is authenticated', `Both ends of every connection proved who they are; between nodes it is mutual TLS.${away}`];
}

function showShares(edges) {
  const kinds = Object.keys(PROTECTIONS);
  const sums = new Map(kinds.map((protection) => [protection, 0]));
  for (const edge of edges) sums.set(edge.protection, sums.get(edge.protection) + edge.opened);
  const all = [...sums.values()].reduce((a, b) => a + b, 0);
  const present = kinds.filter((protection) => sums.get(protection) > 0);
  const percent = (n) => (n && n < all && (n / all < 0.01 || n / all > 0.99) ? `${((n / all) * 100).toFixed(2)} %` : `${Math.round((n / all) * 100)} %`);
  byId('share').replaceChildren(...present.map((protection) => {
    const part = make('span', { class: protection });
    part.style.flexGrow = sums.get(protection);
    return part;
  }));
  byId('share').setAttribute('aria-label', present.map((protection) => `${PROTECTIONS[protection]} ${percent(sums.get(protection))}`).join(', '));
  byId('shares').replaceChildren(...present.map((protection) => make('li', { class: protection },
    make('i'), `${percent(sums.get(protection))} ${PROTECTIONS[protection]} `, make('span', { class: 'quiet' }, `(${count(sums.get(protection))})`))),
  ...(present.length ? [] : [make('li', { class: 'quiet' }, 'No connections yet')]));
}

function show(overview) {
  const now = Date.parse(overview.now);
  const { edges, edges_total: total, refusals, mesh } = overview;
  document.title = `${overview.node} · mtls`;
  say('node', overview.node);
  say('about', [`mtls agent ${overview.version}`, `up ${duration(overview.uptime_seconds)}`,
    mesh ? `${many(mesh.workloads, 'workload')} in the mesh` : 'no configuration yet',
    overview.resident_bytes ? `${bytes(overview.resident_bytes)} resident` : null].filter(Boolean).join(' · '));
  const ready = overview.conditions.every(({ missing }) => !missing);
  byId('ready').className = `pill ${ready ? 'good' : 'warn'}`;
  say('ready', ready ? 'ready' : 'not ready');
  const [level, headline, explanation] = verdict(overview);
  byId('verdict').dataset.level = level;
  say('headline', headline);
  say('explanation', explanation);
  showShares(edges);
  say('open', count(overview.open_connections));
  say('carried', `${bytes(edges.reduce((sum, edge) => sum + volume(edge), 0))} carried`);
  say('refused', count(edges.reduce((sum, edge) => sum + edge.refused, 0)));
  const [most] = refusals;
  say('refusal', most ? `mostly ${most.reason.replaceAll('_', ' ')}` : 'connections that never came to be');
  drawGraph(overview);
  showCertificates(now, overview);
  showConditions(overview.conditions);
  showStrict(overview.strict);
  showPods(overview.pods);
  showEdges(edges, total);
  showRefusals(refusals);
}

function away(reason) {
  document.body.classList.add('away');
  byId('ready').className = 'pill bad';
  say('ready', 'no answer');
  say('fresh', '');
  const since = last ? ` What you see is of ${last.toLocaleTimeString('en-GB')}.` : '';
  say('trouble', `The agent does not answer (${reason}).${since} Trying again every few seconds.`);
  byId('trouble').hidden = false;
}

async function ask() {
  const answer = await fetch('/overview', { signal: AbortSignal.timeout(PATIENCE), cache: 'no-store' });
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  return answer.json();
}

async function refresh() {
  try {
    const overview = await ask();
    last = new Date();
    document.body.classList.remove('away');
    byId('trouble').hidden = true;
    say('fresh', `as of ${last.toLocaleTimeString('en-GB')}`);
    show(overview);
    document.body.dataset.shown = overview.now;
    latest = overview;
  } catch (error) {
    away(error.name === 'TimeoutError' ? 'it takes too long' : error.message);
  }
}

let latest = null;
let running = false;
let timer = 0;

/** One question at a time, and none while nobody looks. */
async function keepAsking() {
  clearTimeout(timer);
  if (running || document.hidden) return;
  running = true;
  await refresh();
  running = false;
  timer = setTimeout(keepAsking, EVERY);
}

addEventListener('resize', () => { if (latest) drawGraph(latest); });
document.addEventListener('visibilitychange', keepAsking);
keepAsking();
