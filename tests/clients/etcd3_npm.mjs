// npm's `etcd3` at its normal work: HTTP/2 by grpc-js. See dialogue.py for how it talks.
//
// Its watches and keep-alives come back by themselves after a lost connection, a watch from the
// revision after the last that it has seen.

import readline from "node:readline";
import { setTimeout as pause } from "node:timers/promises";
import { Etcd3, EtcdLockFailedError } from "etcd3";

const PATIENCE_MS = 60_000;
const PAUSE_MS = 20;
const TTL_S = 2;
const ROUNDS = 5;

const say = (step, facts = {}) => console.log(JSON.stringify({ step, ...facts }));

const told = { isSet: false };
const whenTold = new Promise((resolve) => {
  const input = readline.createInterface({ input: process.stdin });
  const hear = () => {
    told.isSet = true;
    resolve();
  };
  input.once("line", hear).once("close", hear);
});

async function waitUntil(condition) {
  const deadline = Date.now() + PATIENCE_MS;
  for (;;) {
    const value = await condition();
    if (value) return value;
    if (Date.now() > deadline) throw new Error(`not in ${PATIENCE_MS} ms: ${condition}`);
    await pause(PAUSE_MS);
  }
}

async function pairs(range) {
  return Object.entries(await range.sort("Key", "Ascend").strings());
}

async function kv(etcd) {
  for (const [key, value] of [["kv/a", "1"], ["kv/b", "2"], ["kv/c", "3"], ["other", "4"]]) {
    await etcd.put(key).value(value);
  }
  say("get", { found: await etcd.get("kv/b").string(), missing: await etcd.get("kv/none").string() });
  say("prefix", { pairs: await pairs(etcd.getAll().prefix("kv/")) });
  say("range", { pairs: await pairs(etcd.getAll().inRange({ start: "kv/b", end: "z" })) });
  await etcd.delete().key("kv/b");
  say("delete", { pairs: await pairs(etcd.getAll().prefix("kv/")) });
  await etcd.delete().prefix("kv/");
  say("delete prefix", { pairs: await pairs(etcd.getAll().prefix("kv/")) });
  const value = Buffer.from(Array.from({ length: 256 * 4000 }, (_, index) => index % 256));
  await etcd.put("large").value(value);
  say("large", { same: value.equals(await etcd.get("large").buffer()) });
}

async function txn(etcd) {
  await etcd.put("txn/key").value("old");
  await etcd.put("txn/extra").value("1");
  const succeeded = [];
  for (let round = 0; round < 2; round += 1) {
    const outcome = await etcd
      .if("txn/key", "Value", "==", "old")
      .and("txn/key", "Version", ">", 0)
      .then(etcd.put("txn/key").value("new"), etcd.delete().key("txn/extra"))
      .else(etcd.put("txn/else").value("1"), etcd.get("txn/key"))
      .commit();
    succeeded.push(outcome.succeeded);
  }
  say("txn", { succeeded, pairs: await pairs(etcd.getAll().prefix("txn/")) });
}

async function watch(etcd) {
  const watcher = await etcd.watch().prefix("watch/").create();
  watcher.on("put", (kv) => say("event", { event: ["put", `${kv.key}`, `${kv.value}`] }));
  watcher.on("delete", (kv) => say("event", { event: ["delete", `${kv.key}`, ""] }));
  watcher.on("disconnected", () => say("lost"));
  watcher.on("connected", () => say("watching"));
  say("watching");
  await whenTold;
  await watcher.cancel();
}

async function lease(etcd) {
  const kept = etcd.lease(TTL_S);
  const left = etcd.lease(TTL_S, { autoKeepAlive: false });
  await kept.put("lease/kept").value("1");
  await left.put("lease/left").value("1");
  const since = Date.now();
  let keepAlives = 0;
  kept.on("keepaliveSucceeded", () => (keepAlives += 1));
  kept.on("lost", (error) => say("lost", { error: `${error}` }));
  await waitUntil(
    async () =>
      Date.now() - since > 2000 * TTL_S &&
      keepAlives >= 3 &&
      (await etcd.get("lease/left").string()) === null,
  );
  say("kept", {
    kept: await etcd.get("lease/kept").string(),
    left: await etcd.get("lease/left").string(),
  });
  await kept.revoke();
  say("revoked", { kept: await etcd.get("lease/kept").string() });
}

async function lock(etcd, connect) {
  const clients = [etcd, connect()];
  const tryLock = async (client, work) => {
    try {
      await client.lock("mutex").ttl(60).do(work);
      return true;
    } catch (error) {
      if (error instanceof EtcdLockFailedError) return false;
      throw error;
    }
  };
  await tryLock(clients[0], async () => {
    say("held", { other_got_it: await tryLock(clients[1], async () => {}) });
  });
  await etcd.put("count").value("0");
  await Promise.all(
    clients.map(async (client) => {
      for (let round = 0; round < ROUNDS; round += 1) {
        await waitUntil(() =>
          tryLock(client, async () => {
            const count = Number(await client.get("count").string());
            await client.put("count").value(`${count + 1}`);
          }),
        );
      }
    }),
  );
  say("counted", { count: await etcd.get("count").string(), of: `${2 * ROUNDS}` });
  clients[1].close();
}

async function election(etcd, connect) {
  const other = connect();
  const [one, two] = [etcd.election("office"), other.election("office")];
  const first = one.campaign("one");
  await first.wait();
  const second = two.campaign("two");
  let secondIsElected = false;
  const elected = second.wait().then(() => (secondIsElected = true));
  const observer = await two.observe();
  const seen = [observer.leader()];
  observer.on("change", (leader) => seen.push(leader));
  say("elected", { leader: await two.leader(), other: secondIsElected });
  await first.proclaim("one, again");
  await waitUntil(() => seen.at(-1) === "one, again");
  say("proclaimed", { leader: await two.leader(), other: secondIsElected });
  await first.resign();
  await elected;
  await waitUntil(() => seen.at(-1) === "two");
  say("resigned", { leader: await one.leader(), other: secondIsElected });
  say("observed", { leaders: seen });
  await observer.cancel();
  await second.resign();
  other.close();
}

async function restart(etcd) {
  const held = etcd.lease(600);
  held.on("lost", (error) => say("lost", { error: `${error}` }));
  await held.put("leased").value("1");
  const acknowledged = [];
  let number = 0;
  const put = async () => {
    number += 1;
    const key = `restart/${String(number).padStart(6, "0")}`;
    try {
      await etcd.put(key).value("1");
      acknowledged.push(key);
    } catch {
      await pause(PAUSE_MS);
    }
  };
  const putUntil = async (count) => {
    const deadline = Date.now() + PATIENCE_MS;
    while (acknowledged.length < count) {
      if (Date.now() > deadline) throw new Error(`not in ${PATIENCE_MS} ms: ${count} puts`);
      await put();
    }
  };
  await putUntil(10);
  say("busy");
  while (!told.isSet) await put();
  await putUntil(acknowledged.length + 10);
  const present = new Set(await etcd.getAll().prefix("restart/").keys());
  say("back", {
    lost: acknowledged.filter((key) => !present.has(key)),
    leased: await etcd.get("leased").string(),
    lease_s: Number((await held.keepaliveOnce()).TTL),
  });
  await held.revoke();
}

const [endpoint, name] = process.argv.slice(2);
const connect = () => new Etcd3({ hosts: endpoint });
const etcd = connect();
await { kv, txn, watch, lease, lock, election, restart }[name](etcd, connect);
etcd.close();
process.exit(0);
