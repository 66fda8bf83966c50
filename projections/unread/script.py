"""The Lua side of `projections.unread.store`: one script changes a batch and its checkpoint, one looks after time, one reads.

Keys of a partition, all with its hash tag `{<p>:<version>}`, so that a script touches one slot of a cluster; the names of
users' keys are derived in the script from the one that is passed, which a cluster allows within a slot. `<user>` is
`<tenant>.<user>` as tokens:

- `unread:{…}:meta` hash: `checkpoint` (`<epoch>.<seq>`), `seq` of it, `until` (counts of before this sequence are those of a
  fold that is still catching up), `fresh` (Unix milliseconds, by Redis's clock: all that was stored before is counted)
- `unread:{…}:due` sorted set: users by the moment their next notification expires
- `unread:{…}:s:<user>` sorted set: ids of what counts, by sequence
- `unread:{…}:c:<user>` hash: counts by category
- `unread:{…}:x:<user>` sorted set: those of the ids that expire, by when
- `unread:{…}:d:<user>` hash: `i<id>` details (`c<category>`, or `x` and a packed list of category, collapse key, expiry),
  `k<collapse key>` its id, `m` what was given up above the bound (`<seq>,<expiry of the last to expire>`)
- `unread:{…}:r:<user>` hash: the newest of the notifications that do not count (any more): `repeats.fingerprint` of the id, and
  the sequence. Those that count are in `s`
"""

from __future__ import annotations

from typing import Final

_COUNT: Final = """
local base = string.sub(KEYS[1], 1, -6)
local FOR_EVER = 9007199254740992

-- {user, count, more, {category, count, ...}} at a moment; n: what is remembered, where that is known
local function counted(user, n, now)
  n = n or redis.call('ZCARD', base .. ':s:' .. user)
  local more, d = 0, base .. ':d:' .. user
  if redis.call('EXISTS', d) == 0 then return {user, n, more, {}} end
  local c, x = base .. ':c:' .. user, base .. ':x:' .. user
  local m = redis.call('HGET', d, 'm')
  if m and tonumber(string.sub(m, string.find(m, ',', 1, true) + 1)) > now then more = 1 end
  local gone = redis.call('ZRANGEBYSCORE', x, '-inf', now)
  local cats = redis.call('HGETALL', c)
  if #gone > 0 then
    n = n - #gone
    local less = {}
    for i = 1, #gone do
      local details = cmsgpack.unpack(string.sub(redis.call('HGET', d, 'i' .. gone[i]), 2))
      less[details[1]] = (less[details[1]] or 0) + 1
    end
    for i = 1, #cats, 2 do
      if less[cats[i]] then cats[i + 1] = string.format('%d', cats[i + 1] - less[cats[i]]) end
    end
  end
  return {user, n, more, cats}
end

local function milliseconds()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
"""

APPLY: Final = (
    _COUNT
    + """
-- ARGV: expected checkpoint, checkpoint reached, its seq, until, age in ms of the newest record, now in ms (0: no counts),
-- bound, packed users: [user, number of values, values of its operations ...] ..., how many notifications are remembered
if (redis.call('HGET', KEYS[1], 'checkpoint') or '') ~= ARGV[1] then return false end
local now, bound = tonumber(ARGV[6]), tonumber(ARGV[7])
local call, format = redis.call, string.format
local remembered = tonumber(ARGV[9])
local values = cmsgpack.unpack(ARGV[8])
local user, s, r, n, cats, knows, crowded

-- another key of the user than `s` and `r`: most records need none
local function key_of(kind)
  return base .. kind .. user
end

-- `repeats.fingerprint`
local function mark_of(id)
  return string.sub(redis.sha1hex(id), 1, 16)
end

-- how many notifications came after a sequence, as far as they are remembered
local function newer_than(seq)
  local newer = call('ZCOUNT', s, '(' .. seq, '+inf')
  for _, other in ipairs(call('HVALS', r)) do
    if tonumber(other) > tonumber(seq) then newer = newer + 1 end
  end
  return newer
end

-- one that does not count; of a newer one with the same id it has been noted before
local function remember(mark, seq)
  if call('HSETNX', r, mark, seq) == 1 then
    knows, crowded = true, crowded or string.byte(mark) == 48
  end
end

-- whether it is one of the last notifications that do not count
local function was_there(id)
  if knows == nil then knows = call('EXISTS', r) == 1 end
  if not knows then return false end
  local mark = mark_of(id)
  local seq = call('HGET', r, mark)
  if not seq then return false end
  if newer_than(seq) < remembered then return true end
  call('HDEL', r, mark)
  return false
end

-- now and then: twice as many as are needed fit the compact form of a hash, and so the oldest go many at a time
local function thin_out()
  if call('HLEN', r) <= 2 * remembered then return end
  local all, seqs = call('HGETALL', r), {}
  for i = 2, #all, 2 do seqs[#seqs + 1] = tonumber(all[i]) end
  table.sort(seqs)
  local oldest = seqs[#seqs - remembered + 1]
  for i = 2, #all, 2 do
    if tonumber(all[i]) < oldest then call('HDEL', r, all[i - 1]) end
  end
end

local function count(category, change)
  cats = cats or {}
  cats[category] = (cats[category] or 0) + change
end

-- what is known of an id that no longer counts
local function forget(id)
  local field, d = 'i' .. id, key_of(':d:')
  local details = call('HGET', d, field)
  if not details then return end
  call('HDEL', d, field)
  local category = string.sub(details, 2)
  if string.byte(details) == 120 then
    local parts = cmsgpack.unpack(category)
    category = parts[1]
    if parts[2] ~= '' then call('HDEL', d, 'k' .. parts[2]) end
    if parts[3] < FOR_EVER then call('ZREM', key_of(':x:'), id) end
  end
  if category ~= '' then count(category, -1) end
end

local function take_off(id)
  call('ZREM', s, id)
  n = (n or call('ZCARD', s) + 1) - 1
  forget(id)
end

local function remove(id)
  local seq = call('ZSCORE', s, id)
  if not seq then return end
  take_off(id)
  remember(mark_of(id), seq)
end

-- more than is remembered: what has expired by the record's own time goes first, then the oldest
local function give_up(at)
  local x, d = key_of(':x:'), key_of(':d:')
  for _, id in ipairs(call('ZRANGEBYSCORE', x, '-inf', at)) do remove(id) end
  local given_up_to
  local till = 0
  while n > bound do
    local popped = call('ZPOPMIN', s)
    n = n - 1
    given_up_to = popped[2]
    till = math.max(till, tonumber(call('ZSCORE', x, popped[1]) or FOR_EVER))
    forget(popped[1])
    if n < remembered then remember(mark_of(popped[1]), popped[2]) end
  end
  if given_up_to then
    local m = call('HGET', d, 'm')
    if m then till = math.max(till, tonumber(string.sub(m, string.find(m, ',', 1, true) + 1))) end
    call('HSET', d, 'm', given_up_to .. ',' .. format('%.0f', till))
  end
end

-- the rows of notifications up to a sequence have left the inbox: one that comes again is new there, too
local function unlearn(up_to)
  local all = call('HGETALL', r)
  for i = 2, #all, 2 do
    if tonumber(all[i]) <= up_to then call('HDEL', r, all[i - 1]) end
  end
end

-- the same of one notification of a former incarnation of the log, unless its id is that of a newer one by now
local function leave(id)
  local seq, mark = call('ZSCORE', s, id), mark_of(id)
  local known = call('HGET', r, mark)
  if seq and tonumber(seq) <= 0 then take_off(id) end
  if known and tonumber(known) <= 0 then call('HDEL', r, mark) end
end

-- one that is not for the screen
local function pass(seq, id)
  if was_there(id) then return end
  local known = call('ZSCORE', s, id)
  if not known or newer_than(known) >= remembered then remember(mark_of(id), seq) end
end

local function add(at, seq, id, category, key, expires)
  if was_there(id) then return end
  if call('ZADD', s, 'NX', seq, id) == 0 then
    if newer_than(call('ZSCORE', s, id)) < remembered then return end
    take_off(id) -- so old that it is new again
    call('ZADD', s, seq, id)
  end
  n = (n or call('ZCARD', s) - 1) + 1
  local d = category and key_of(':d:')
  if key then
    if key ~= '' then
      local former = call('HGET', d, 'k' .. key)
      if former then remove(former) end
      call('HSET', d, 'k' .. key, id)
    end
    call('HSET', d, 'i' .. id, 'x' .. cmsgpack.pack({category, key, expires}))
    if expires < FOR_EVER then
      call('ZADD', key_of(':x:'), expires, id)
      call('ZADD', base .. ':due', 'LT', expires, user)
    end
  elseif category then
    call('HSET', d, 'i' .. id, 'c' .. category)
  end
  if category and category ~= '' then count(category, 1) end
  if n > bound then give_up(at) end
end

local function clear(up_to)
  local ids, d = call('ZRANGEBYSCORE', s, '-inf', up_to), key_of(':d:')
  local m = call('HGET', d, 'm')
  if m and up_to >= tonumber(string.sub(m, 1, string.find(m, ',', 1, true) - 1)) then
    call('HDEL', d, 'm')
    m = false
  end
  if #ids == 0 then return end
  local newest = call('ZREVRANGEBYSCORE', s, up_to, '-inf', 'WITHSCORES', 'LIMIT', 0, remembered)
  for i = 1, #newest, 2 do remember(mark_of(newest[i]), newest[i + 1]) end
  n = n or call('ZCARD', s)
  if #ids == n then
    call('UNLINK', s, key_of(':c:'), key_of(':x:'), d)
    if m then call('HSET', d, 'm', m) end
    n, cats = 0, nil
    return
  end
  call('ZREMRANGEBYSCORE', s, '-inf', up_to)
  n = n - #ids
  for _, id in ipairs(ids) do forget(id) end
end

-- operations by their numbers, and how many values each takes; an `add` may come without category, or without key and expiry
local doing = {add, add, add, remove, clear, pass, leave, unlearn, remember}
local takes = {3, 4, 6, 1, 1, 2, 1, 1, 2}

-- whether all users of this batch have a hash of ids that do not count, or none has (as in most of a rebuild): one question for
-- all of them. nil: some have, and each is asked for when that must be known
local function all_know()
  local hashes, at = {}, 1
  while values[at] do
    hashes[#hashes + 1] = base .. ':r:' .. values[at]
    at = at + 2 + values[at + 1]
  end
  if #hashes == 0 or #hashes > 4000 then return nil end -- Lua passes 8000 arguments at most; a batch has 2000 records
  local known = call('EXISTS', unpack(hashes))
  if known == #hashes then return true end
  if known == 0 then return false end
end

local all = all_know()
local out = {}
local at = 1
while values[at] do
  user = values[at]
  s, r, n, cats, knows, crowded = base .. ':s:' .. user, base .. ':r:' .. user, nil, nil, all, false
  local last = at + 1 + values[at + 1]
  at = at + 2
  while at <= last do
    local what = values[at]
    if what == 1 then -- by far the most
      add(values[at + 1], values[at + 2], values[at + 3])
      at = at + 4
    else
      doing[what](unpack(values, at + 1, at + takes[what]))
      at = at + 1 + takes[what]
    end
  end
  if crowded then thin_out() end
  for category, change in pairs(cats or {}) do
    if change ~= 0 and call('HINCRBY', key_of(':c:'), category, change) == 0 then call('HDEL', key_of(':c:'), category) end
  end
  if now > 0 then out[#out + 1] = counted(user, n, now) end
end
call('HSET', KEYS[1], 'checkpoint', ARGV[2], 'seq', ARGV[3], 'until', ARGV[4], 'fresh', format('%.0f', milliseconds() - ARGV[5]))
return cmsgpack.pack(out)
"""
)
"""Returns nil where the stored checkpoint is another, else the packed counts of the touched users."""

ATTEND: Final = (
    _COUNT
    + """
-- ARGV: checkpoint, whether all there is is counted (1 or 0), ms: all that was stored so long ago is counted (-1: unknown),
-- now in ms, most users
if redis.call('HGET', KEYS[1], 'checkpoint') ~= ARGV[1] then return false end
if ARGV[2] == '1' then redis.call('HSET', KEYS[1], 'until', '0') end
if ARGV[3] ~= '-1' then redis.call('HSET', KEYS[1], 'fresh', string.format('%.0f', milliseconds() - ARGV[3])) end
local out, now = {}, tonumber(ARGV[4])
for _, user in ipairs(redis.call('ZRANGEBYSCORE', base .. ':due', '-inf', now, 'LIMIT', 0, ARGV[5])) do
  local next = redis.call('ZRANGEBYSCORE', base .. ':x:' .. user, '(' .. ARGV[4], '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
  if next[2] then
    redis.call('ZADD', base .. ':due', next[2], user)
  else
    redis.call('ZREM', base .. ':due', user)
  end
  out[#out + 1] = counted(user, nil, now)
end
return cmsgpack.pack(out)
"""
)
"""Returns nil where the stored checkpoint is another, else the packed counts of users of whom something has expired."""

READ: Final = (
    _COUNT
    + """
-- ARGV: now in ms, users ...
local meta = redis.call('HMGET', KEYS[1], 'checkpoint', 'seq', 'until', 'fresh')
if not meta[1] then return {} end
local behind = tonumber(meta[2]) < tonumber(meta[3]) and 1 or 0
local out = {meta[1], behind, math.max(0, milliseconds() - meta[4])}
for i = 2, #ARGV do
  out[#out + 1] = counted(ARGV[i], nil, tonumber(ARGV[1]))
end
return out
"""
)
"""Returns checkpoint, whether it is behind what was shown before, its age in ms, and for each user its counts."""
