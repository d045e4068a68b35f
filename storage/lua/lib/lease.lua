-- Leases. A lease is live exactly as long as its score in PREFIX:leases (expiry, milliseconds; inf:
-- pinned) lies ahead. What a lapsed one leaves is swept little by little by the scripts that write
-- leases; until then nobody sees it, because every reader asks the score.
-- include: lapse

local SWEEP_LEASES = 4
local SWEEP_RESOURCES = 256

-- Tell whether the lease is live.
local function lease_is_live(prefix, id, now)
  local expires = redis.call('ZSCORE', prefix .. ':leases', id)
  return expires and (expires == 'inf' or tonumber(expires) > lapse_ms(prefix, now))
end

-- Hold a resource by a lease that is live.
local function lease_hold(prefix, id, resource)
  redis.call('SADD', prefix .. ':held:' .. id, resource)
  redis.call('SADD', prefix .. ':holders:' .. resource, id)
end

-- Let go of up to `count` resources of a lease; tell whether it is gone with that.
local function lease_release(prefix, id, count)
  local held = prefix .. ':held:' .. id
  for _, resource in ipairs(redis.call('SPOP', held, count)) do
    redis.call('SREM', prefix .. ':holders:' .. resource, id)
  end
  if redis.call('EXISTS', held) == 1 then
    return false
  end
  redis.call('DEL', prefix .. ':lease:' .. id)
  redis.call('ZREM', prefix .. ':leases', id)
  return true
end

-- Remove a lease and its index entries, whole.
local function lease_drop(prefix, id)
  while not lease_release(prefix, id, 1024) do end
end

-- Write a lease that has no past.
local function lease_write(prefix, id, now, expires, labels)
  redis.call('HSET', prefix .. ':lease:' .. id, 'created', now, 'labels', labels)
  redis.call('ZADD', prefix .. ':leases', expires, id)
end

-- Clear a bounded part of what lapsed leases left.
local function leases_sweep(prefix, now)
  local lapsed = redis.call('ZRANGEBYSCORE', prefix .. ':leases', '-inf', lapse_ms(prefix, now), 'LIMIT', 0, SWEEP_LEASES)
  for _, id in ipairs(lapsed) do
    lease_release(prefix, id, SWEEP_RESOURCES)
  end
end

-- Return {id, expiry, created, labels, resources} of a lease.
local function lease_read(prefix, id)
  local fields = redis.call('HMGET', prefix .. ':lease:' .. id, 'created', 'labels')
  return {
    id,
    redis.call('ZSCORE', prefix .. ':leases', id),
    fields[1],
    fields[2],
    redis.call('SMEMBERS', prefix .. ':held:' .. id),
  }
end
