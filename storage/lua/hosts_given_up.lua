-- Tell which registry hosts are given up.
--
-- KEYS[1] prefix of the farm's keys
-- return  {host, milliseconds since, the last failure, milliseconds until it is tried again} each, longest ago first
-- include: time
-- include: host
-- include: circuit
local prefix, now, found = KEYS[1], now_ms(), {}
for _, host in ipairs(redis.call('ZRANGE', prefix .. ':circuits', 0, -1)) do
  local circuit = circuit_of(prefix, host)
  if circuit.state ~= 'closed' then
    table.insert(found, {host, now - circuit.opened_at, circuit.failure, math.max(0, circuit.retry_at - now)})
  end
end
return found
