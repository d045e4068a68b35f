-- Read what is known of each registry host that was asked of late, for people.
--
-- KEYS[1] prefix of the farm's keys
-- return  a list of {host, limit or nil, rate or nil, milliseconds until anybody may ask, 429s, requests of late,
--         slots taken, who waits for one, the two lists that quota_list returns}
-- Hosts that are forgotten leave the list.
-- include: time
-- include: host
-- include: rate
-- include: quota
local prefix, now, found = KEYS[1], now_ms(), {}
for _, host in ipairs(redis.call('SMEMBERS', prefix .. ':hosts')) do
  local known = redis.call('HMGET', prefix .. ':host:' .. host, 'limit', 'rate', 'not_before', 'refused', 'asked_at')
  if redis.call('EXISTS', prefix .. ':host:' .. host) == 0 then
    redis.call('SREM', prefix .. ':hosts', host)
  else
    local _, recent = host_asked(prefix, host, 0, now)
    found[#found + 1] = {
      host, known[1], known[2], math.max(0, tonumber(known[3] or 0) - now), tonumber(known[4] or 0),
      tostring(recent / RECENT_S),
      redis.call('ZCOUNT', prefix .. ':slots:' .. host, '(' .. now, '+inf'),
      redis.call('ZCOUNT', prefix .. ':queue-seen:' .. host, '(' .. now, '+inf'),
      quota_list(prefix, host, now),  -- both: it is the last of the table
    }
  end
end
return found
