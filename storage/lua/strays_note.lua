-- Note objects and unfinished uploads that nothing names, and tell which have been so for as long as the grace is.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1]  milliseconds that one must have been a stray
-- ARGV[2…] digest ('-' where none is known), object key, upload ID ('' for an object), digest, …
-- return   places in the list, from 1, of the strays whose grace is over. Objects among them are in `deleting` then
-- Named is what the blob's record or its recorded upload names, and what a live lease holds; a live flight of the digest
-- spares all its keys. Without a live flight nobody can record a key that isn't recorded: commit and upload need the
-- owner's fence. A key without a digest is
-- held from before its upload until its record is there; those of drivers' files are in `local:objects` from then on.
-- include: time
-- include: collect
local MONTH_MS = 2592000000
local prefix, now, grace = KEYS[1], now_ms(), tonumber(ARGV[1])
local strays = prefix .. ':strays'
-- What ended by itself is not noted again, and would stay.
redis.call('ZREMRANGEBYSCORE', strays, '-inf', now - grace - MONTH_MS)

local function is_named(digest, key, upload_id)
  if digest == '-' then
    return redis.call('HEXISTS', prefix .. ':local:objects', key) == 1 or is_held(prefix, 'object:' .. key, now)
  end
  local flight = prefix .. ':flight:blob:' .. digest
  if (tonumber(redis.call('HGET', flight, 'expires') or 0) or 0) > now then
    return true
  end
  local upload = redis.call('HMGET', prefix .. ':upload:blob:' .. digest, 'key', 'upload_id')
  if upload[1] == key and (upload_id == '' or upload[2] == upload_id) then
    return true
  end
  local value = redis.call('GET', prefix .. ':blob:' .. digest)
  return upload_id == '' and value and cmsgpack.unpack(value)[3].key == key
end

local over = {}
for i = 2, #ARGV, 3 do
  local digest, key, upload_id = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local doomed, member = digest .. ' ' .. key, key .. ' ' .. upload_id
  if is_named(digest, key, upload_id) then
    redis.call('ZREM', strays, member)
  elseif upload_id ~= '' or not redis.call('ZSCORE', prefix .. ':deleting', doomed) then
    redis.call('ZADD', strays, 'NX', now, member)
    if tonumber(redis.call('ZSCORE', strays, member)) + grace <= now then
      redis.call('ZREM', strays, member)
      if upload_id == '' then
        redis.call('ZADD', prefix .. ':deleting', now, doomed)
      end
      over[#over + 1] = (i + 1) / 3
    end
  end
end
return over
