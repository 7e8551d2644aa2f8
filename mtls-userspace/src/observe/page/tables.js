
// Rows in, tables out: what is urgent first, and no longer than a person reads.

const ROWS = 100;

const END = { warn: 0.25, bad: 0.08 };

function table(heads, rows, empty, what = 'row') {
  if (!rows.length) return [make('div', { class: 'empty' }, empty)];
  const cells = heads.map((head) => make('th', head.startsWith('#') ? { class: 'number' } : {}, head.replace('#', '')));
  const shown = make('div', { class: 'scroll' },
    make('table', {}, make('thead', {}, make('tr', {}, ...cells)), make('tbody', {}, ...rows.slice(0, ROWS))));
  const rest = rows.length - ROWS;
  return rest > 0 ? [shown, make('p', { class: 'more' }, `and ${many(rest, what)} more`)] : [shown];
}

const cell = (...children) => make('td', {}, ...children);
const number = (text) => make('td', { class: 'number' }, text);
const second = (text) => make('span', { class: 'second' }, text);

/** Seconds until a date, by the agent's clock. */
const until = (now, date) => (date ? (Date.parse(date) - now) / 1000 : null);

function timeLeft(left, lifetime) {
  if (left === null) return make('td', { class: 'left bad' }, make('span', { class: 'time' }, 'none yet'));
  const share = lifetime ? Math.min(1, Math.max(0, left / lifetime)) : null;
  const level = left <= 0 || (share !== null && share < END.bad) ? 'bad' : share !== null && share < END.warn ? 'warn' : '';
  const gauge = make('span');
  gauge.style.width = `${(share ?? 0) * 100}%`;
  return make('td', { class: `left ${level}` },
    make('span', { class: 'time' }, left > 0 ? duration(left) : `ended ${duration(-left)} ago`),
    share === null ? null : make('div', { class: 'gauge' }, gauge));
}

function certificateRow(now, certificate) {
  const left = until(now, certificate.not_after);
  const lifetime = certificate.not_before && left !== null
    ? (Date.parse(certificate.not_after) - Date.parse(certificate.not_before)) / 1000 : null;
  const next = until(now, certificate.next_renewal);
  const [, namespace, account] = /\/ns\/([^/]+)\/sa\/([^/]+)$/.exec(certificate.identity) ?? [];
  const renewal = next === null ? '–' : next > 0 ? `in ${duration(next)}` : 'now';
  return make('tr', {},
    cell(account ? `${namespace}/${account}` : certificate.identity, make('span', { class: 'second mono' }, certificate.identity)),
    timeLeft(left, lifetime),
    cell(renewal, certificate.failing
      ? make('span', { class: 'second' }, make('span', { class: 'pill small bad' }, `${many(certificate.failures, 'failure')}`))
      : second(`${count(certificate.renewals)} so far`)));
}

function issuerRow(now, issuer) {
  const left = until(now, issuer.not_after);
  // How long an issuer was made for is not known here: a month is when to worry, a week when to hurry.
  const level = left < 7 * 86400 ? ' bad' : left < 30 * 86400 ? ' warn' : '';
  return make('tr', {},
    cell(issuer.subject, second(`${issuer.role}, serial ${issuer.serial.slice(0, 16)}`)),
    make('td', { class: `left${level}` }, make('span', { class: 'time' }, left > 0 ? duration(left) : `ended ${duration(-left)} ago`)),
    cell('–'));
}

function showCertificates(now, overview) {
  const soonest = [...overview.certificates].sort((a, b) => (until(now, a.not_after) ?? -1) - (until(now, b.not_after) ?? -1));
  const rows = soonest.slice(0, ROWS).map((certificate) => certificateRow(now, certificate));
  // The issuers are few, and must not fall behind a thousand leaves.
  const issuers = overview.issuers.slice(0, 10).map((issuer) => issuerRow(now, issuer));
  byId('certificates').replaceChildren(...table(['Identity', 'Time left', 'Renewal'], [...issuers, ...rows],
    'No identity is needed on this node yet.', 'certificate'));
  say('certificates-count', overview.certificates.length ? many(overview.certificates.length, 'identity', 'identities') : '');
  const [first] = soonest;
  const left = first ? until(now, first.not_after) : null;
  say('soonest', !first ? '–' : left === null ? 'none yet' : left > 0 ? duration(left) : 'ended');
  const failing = overview.certificates.filter((certificate) => certificate.failing).length;
  say('renewal', failing ? `${many(failing, 'renewal')} failing` : first ? 'all renewals work' : 'no identities yet');
}

function showPods(pods) {
  const urgency = { failed: 0, pending: 1, enrolled: 2 };
  const level = { failed: 'bad', pending: 'warn', enrolled: 'good' };
  const sorted = [...pods].sort((a, b) => urgency[a.state] - urgency[b.state]);
  const rows = sorted.map((pod) => make('tr', {}, cell(pod.name, second(pod.namespace)), cell(pod.mode ?? '–'),
    cell(make('span', { class: `pill small ${level[pod.state]}` }, pod.state))));
  byId('pods').replaceChildren(...table(['Pod', 'Mode', 'State'], rows, 'No pod of this node is to be enrolled.', 'pod'));
  say('pods-count', pods.length ? `${count(pods.filter((pod) => pod.state === 'enrolled').length)} of ${count(pods.length)} enrolled` : '');
}

function showEdges(edges, total) {
  const rows = edges.map((edge) => make('tr', { class: kind(edge) },
    cell(make('i', { class: 'dot' }), `${source(edge).workload} → ${destination(edge).workload}`,
      second(`${source(edge).namespace} → ${destination(edge).namespace}`)),
    cell(PROTECTIONS[edge.protection]),
    number(count(edge.open)), number(count(edge.opened)), number(count(edge.refused)), number(bytes(volume(edge)))));
  const heads = ['From and to', 'Protection', '#Open', '#Opened', '#Refused', '#Bytes'];
  byId('edges').replaceChildren(...table(heads, rows, 'Nothing has been carried yet.', 'pair'));
  say('edges-count', total ? many(total, 'pair') : '');
}

function showRefusals(refusals) {
  const rows = refusals.map((row) => make('tr', {},
    cell(row.reason.replaceAll('_', ' '), second(row.policy ? `policy ${row.policy}` : row.direction)), number(count(row.count))));
  byId('refusals').replaceChildren(...table(['Reason', '#Connections'], rows, 'No connection was refused by this agent.', 'reason'));
}

const SIGNS = { met: '✓', missing: '✕', unsure: '?' };

const finding = (level, what, why) => make('li', { class: level }, make('span', { class: 'sign' }, SIGNS[level]),
  make('span', {}, what, why ? make('span', { class: 'why' }, why) : null));

function showConditions(conditions) {
  byId('conditions').replaceChildren(...conditions.map(({ name: what, missing }) => finding(missing ? 'missing' : 'met', what, missing)));
}

/** Who would be cut off if STRICT came now. */
function showStrict(strict) {
  if (!strict) {
    byId('strict').replaceChildren(finding('unsure', 'Plaintext is not observed yet'));
    return;
  }
  const rows = strict.cut_off.map(({ workload, port, peers, unnamed, connections }) => {
    const who = [...peers, ...(unnamed ? [many(unnamed, 'unnamed address', 'unnamed addresses')] : [])];
    return finding('missing', `${workload} port ${port}: ${many(peers.length + unnamed, 'peer')} would be cut off`,
      `${who.join(', ')}; ${many(connections, 'connection')}`);
  });
  const rest = strict.cut_off_total - strict.cut_off.length;
  if (rest > 0) rows.push(finding('missing', `and ${many(rest, 'port')} more`));
  const window = duration(strict.window_seconds);
  if (strict.ready) {
    rows.push(finding('met', 'Nobody would be cut off', strict.observed_seconds === null
      ? 'Every port is STRICT already.' : `Observed for all of the last ${window}.`));
  } else if (!strict.cut_off.length) {
    rows.push(finding('unsure', 'Nobody seen so far', `Observed for ${duration(strict.observed_seconds ?? 0)} of the ${window} to look back at.`));
  } else if (strict.unsure) {
    rows.push(finding('unsure', `${many(strict.unsure, 'workload')} not observed for ${window} yet, or not completely`));
  }
  byId('strict').replaceChildren(...rows);
}
