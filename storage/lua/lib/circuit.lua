-- The circuit breaker of a registry host: what cluster/circuit.py decides, in the host's hash. `circuit` is open or
-- half_open, closed where there is none; `failures` in a row, `failed_at` when the last was counted; `opened_at`
-- since when it isn't closed, `failure` the last one; `retry_at` when the next probe may begin, `probe` the slot of
-- the one that is under way. `circuits` names the hosts whose circuit isn't closed.

local function circuit_of(prefix, host)
  local known = redis.call(
    'HMGET', prefix .. ':host:' .. host, 'circuit', 'failures', 'failed_at', 'opened_at', 'retry_at', 'probe', 'failure')
  return {
    state = known[1] or 'closed',
    failures = tonumber(known[2] or 0),
    failed_at = tonumber(known[3] or 0),
    opened_at = tonumber(known[4] or 0),
    retry_at = tonumber(known[5] or 0),
    probe = known[6],
    failure = known[7] or '',
  }
end

local function circuit_is_probe(circuit, slot)
  return circuit.state == 'half_open' and circuit.probe == slot
end

-- Return whether a request may be made now; unless the circuit is closed, it is a probe.
local function circuit_admits(circuit, slot, now)
  return circuit.state == 'closed' or circuit.probe == slot or now >= circuit.retry_at
end

-- Note that a request that was admitted is made; return whether it is the probe.
local function circuit_begun(prefix, host, circuit, slot, now, open_ms)
  if circuit.state == 'closed' then
    return false
  end
  if circuit.probe ~= slot then
    host_set(prefix, host, 'circuit', 'half_open', 'probe', slot, 'retry_at', now + open_ms)
  end
  return true
end

-- Note that a request was answered; return whether that closed the circuit.
local function circuit_answered(prefix, host, slot)
  local circuit = circuit_of(prefix, host)
  local is_probe = circuit_is_probe(circuit, slot)
  if is_probe or (circuit.state == 'closed' and circuit.failures > 0) then
    redis.call('HDEL', prefix .. ':host:' .. host,
      'circuit', 'failures', 'failed_at', 'opened_at', 'retry_at', 'probe', 'failure')
    redis.call('ZREM', prefix .. ':circuits', host)
  end
  return is_probe
end

local function circuit_open(prefix, host, opened_at, retry_at, failure)
  host_set(prefix, host, 'circuit', 'open', 'opened_at', opened_at, 'retry_at', retry_at, 'failure', failure)
  redis.call('HDEL', prefix .. ':host:' .. host, 'probe')
  redis.call('ZADD', prefix .. ':circuits', opened_at, host)
  redis.call('EXPIRE', prefix .. ':circuits', HOST_S)
end

-- Note that a request failed; return whether that opened a closed circuit.
local function circuit_failed(prefix, host, slot, failure, now, limit, open_ms, burst_ms)
  local circuit = circuit_of(prefix, host)
  if circuit_is_probe(circuit, slot) then
    circuit_open(prefix, host, circuit.opened_at, now + open_ms, failure)
  end
  if circuit.state ~= 'closed' or now - circuit.failed_at < burst_ms then
    return false
  end
  host_set(prefix, host, 'failures', circuit.failures + 1, 'failed_at', now)
  if limit == 0 or circuit.failures + 1 < limit then
    return false
  end
  circuit_open(prefix, host, now, now + open_ms, failure)
  return true
end

-- Note that a request ended; one without an outcome, a cancelled one say, holds up no other probe.
local function circuit_left(prefix, host, slot, now)
  if circuit_is_probe(circuit_of(prefix, host), slot) then
    host_set(prefix, host, 'retry_at', now)
  end
end
